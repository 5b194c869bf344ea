"""Wrong answers to the exercises of notebook 11, as learners write them."""

import torch

from tests.support.wrong_answers import assert_told, each


def best(root=torch.linalg.cholesky, back=torch.linalg.inv):
    """The solution of the second, with another root of H or another way back."""
    def mine(lost, h, rank):
        u, s, vh = torch.linalg.svd(lost @ root(h))
        return (u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]) @ back(root(h))
    return mine


def left(weights=torch.linalg.cholesky, power=2, first=0):
    """That of the third, with another root of H or power, or without some ranks."""
    def mine(lost, h):
        s = torch.linalg.svd(lost @ weights(h))[1] ** power
        sums = torch.stack([s[k:].sum() for k in range(len(s) + 1)])
        return sums[first:] / sums[0]
    return mine


WRONG = {
    "weighed_loss": [
        (lambda d, h: torch.einsum("oi,oi->", d, d).item(), "H is missing"),
        (lambda d, h: torch.einsum("oi,i,oi->", d, h.diag(), d).item(), "diagonal alone"),
        (lambda d, h: torch.einsum("oi,ij,oj->", d, h, d).item() ** 0.5, "not its root"),
        (lambda d, h: torch.einsum("oi,ij,oj->o", d, h, d).mean().item(), "not the mean"),
        (lambda d, h: torch.einsum("oi,ij,pj->", d, h, d).item(), "sums the whole matrix"),
    ],
    "best_product": [
        (best(root=lambda h: torch.eye(len(h))), "init svd"),
        (best(root=lambda h: torch.diag(h.diag() ** 0.5)), "init qera"),
        (best(back=lambda r: torch.eye(len(r))), "R has to come off again"),
        (best(root=lambda h: torch.linalg.cholesky(h, upper=True)), "this R is the transpose"),
        (best(back=lambda r: r), "INVERSE of R"),
        (best(back=lambda r: torch.linalg.inv(r.T)), "transpose of R's inverse"),
    ],
    "left_at_rank": [
        (left(power=1), "square the singular values"),
        (left(weights=lambda h: torch.eye(len(h))), "these are D's singular values"),
        (left(first=1), "rank 0 is missing"),
        (lambda d, h: 1 - left()(d, h), "what the adapter mends"),
        (lambda d, h: left()(d, h) ** 0.5, "not its root"),
    ],
    "moved_codes": [
        (lambda q, u, s, m: torch.round(q + u / s), "has no place in the file"),
        (lambda q, u, s, m: q + torch.round(u / s).clip(0, m), "clamp the sum"),
        (lambda q, u, s, m: torch.round(q + u).clip(0, m), "divide it by the scale"),
        (lambda q, u, s, m: (q + u / s).int().float().clip(0, m), "round to the nearest"),
        (lambda q, u, s, m: torch.round(q + u / s).clip(0, m) * s, "codes are asked for"),
    ],
    "straight_through": [
        (lambda g, w, m, b, a: (g @ a.T, b.T @ g), "has no gradient"),
        (lambda g, w, m, b, a: (b.new_zeros(b.shape), a.new_zeros(a.shape)),
         "nothing would be learned"),
        (lambda g, w, m, b, a: ((k := torch.where((w < 0) | (w > m), 0.0, g)) @ a.T, b.T @ k),
         "look at the rounded code"),
        (lambda g, w, m, b, a: (b.T @ (k := g * (w.round().clamp(0, m) == w.round())), k @ a.T),
         "B's gradient first"),
        (lambda g, w, m, b, a: ((k := g * (w.round() <= m)) @ a.T, b.T @ k), "lower end too"),
    ],
    "merged_zeros": [
        (lambda z, s, b, a: z + (b @ a) / s, "the zero-point is subtracted"),
        (lambda z, s, b, a: z - b @ a, "divide by the scale"),
        (lambda z, s, b, a: z - s * (b @ a), "not multiply"),
        (lambda z, s, b, a: torch.round(z - (b @ a) / s), "lose the update again"),
        (lambda z, s, b, a: (b @ a) / -s, "this is the change"),
    ],
}


@each(WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(name, mine, told, capsys):
    assert_told(name, mine, told, capsys)
