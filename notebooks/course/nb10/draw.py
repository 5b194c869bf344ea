"""What notebook 10 draws: a block's bytes and weights, how far a fault lies from what was measured,
and answers over bits.

Pure functions of their arguments (see `course/kit/picture.py`), with fixed axes so that the
settings of a slider compare.
"""
import struct
from collections.abc import Sequence

from qlora_lib.serving.verify import CLOSE, FAR, NEAR

from ..kit.picture import COLORS, interval

LEAST, MOST = 1e-3, 100.0  # of a distance that is drawn
DIGIT = 5.7  # points from a digit of a byte to the next
KINDS = {"nearest": "rtn", "gptq": "gptq"}


def block_bytes(d: float, codes: Sequence[int]) -> bytes:
    """The 18 bytes of a block of Q4_0."""
    return struct.pack("<e", d) + bytes(codes[i] | codes[i + 16] << 4 for i in range(16))


def draw_block(axes, d: float, place: int, code: int, codes: Sequence[int]) -> None:
    """Above, a block's bytes in hex, with the half that holds one code marked; below, its weights.

    codes: the 32 of the block, of which the one at `place` is set to `code`.
    """
    above, below = axes
    codes = [*codes[:place], code, *codes[place + 1:]]
    block, high = block_bytes(d, codes), place >= 16
    for i, byte in enumerate(block):
        for half, digit in enumerate(f"{byte:02x}"):  # the high half is written first
            mine = i == 2 + place % 16 and high == (half == 0)
            above.annotate(
                digit, (i, 0), ((half - 0.5) * DIGIT, 0), textcoords="offset points", ha="center",
                va="center", fontsize=9, family="monospace", weight="bold" if mine else "normal",
                color=COLORS["qlora"] if mine else COLORS["gptq"] if i < 2 else "black")
    above.axvline(1.5, color=COLORS["muted"], linewidth=1)
    above.set(xlim=(-0.7, 17.7), ylim=(-1, 1), yticks=[], xticks=range(18), xlabel="byte",
              title=f"code {place} is {code}, in the {'high' if high else 'low'} half of byte "
                    f"{2 + place % 16}")
    above.grid(False)
    stored = struct.unpack("<e", block[:2])[0]  # d, as fp16 has it
    weights = [stored * (q - 8) for q in codes]
    others = [i for i in range(32) if i != place]
    below.vlines(others, 0, [weights[i] for i in others], color=COLORS["muted"], linewidth=3)
    below.vlines([place], 0, [weights[place]], color=COLORS["qlora"], linewidth=5)
    below.axhline(0, color=COLORS["fp"], linewidth=1)
    below.set(xlim=(-1, 32), ylim=(-1, 1), xlabel="weight", ylabel="d (q - 8)",
              title=f"weight {place} = {stored:.4g} ({code} - 8) = {weights[place]:.3g}")


def draw_distances(ax, fault: str, questions: int, far: dict[str, dict[str, list[float]]]) -> None:
    """How far the first tokens of a faulty server lie from what was measured and from what each of
    the adapter's faults would say, a bar each, over the first `questions` questions.

    far: {fault: {what may have been served: [distance of each question]}}
    """
    means = {name: sum(values[:questions]) / questions for name, values in far[fault].items()}
    nearest = min(means, key=means.get)
    for place, (name, mean) in enumerate(means.items()):
        shown = min(max(mean, LEAST), MOST)
        ax.barh(place, shown - LEAST, left=LEAST, height=0.55,
                color=COLORS["gptq" if name == nearest else "muted"])
        ax.text(1.15 * shown, place, _size(mean), va="center", fontsize=11)
    last = len(means)
    for limit, word, side, first, end in (  # the first two are for "as measured" alone
            (CLOSE, "close", "right", -0.9, 0.4), (FAR, "far", "left", -0.9, 0.4),
            (NEAR, "near", "right", 0.6, last)):
        ax.plot([limit, limit], [first, end], color=COLORS["qlora"], linestyle=":", linewidth=1.5)
        ax.text(limit, last if word == "near" else -0.5, f" {word}: {limit:g} ", ha=side,
                va="bottom", fontsize=10, color=COLORS["qlora"])
    ax.set(xscale="log", xlim=(LEAST, MOST), ylim=(last, -0.9),
           xlabel="mean difference of log probabilities",
           title=f"nearest: {nearest}, {_size(means[nearest])} off")
    ax.set_yticks(range(len(means)), labels=[name.removeprefix("adapter ") for name in means])
    ax.grid(axis="y", visible=False)


def _size(mean: float) -> str:
    return f"{mean:.2g}" if mean >= LEAST else f"under {LEAST:g}"


def draw_bits(ax, rows: Sequence[dict]) -> None:
    """Exact match with its interval over the bits a weight, a point a row, side by side where
    they have the same bits.

    rows: {"name": how rounded and where the adapter is, "bits", "correct", "n"}
    """
    bits = sorted({row["bits"] for row in rows})
    for width in bits:
        own = [row for row in rows if row["bits"] == width]
        for place, row in enumerate(own):
            color = KINDS[row["name"].split()[0]]
            at = width + 0.13 * (place - (len(own) - 1) / 2)
            interval(ax, at, row["correct"], row["n"], COLORS[color], upright=True)
            ax.annotate(row["name"].replace(" ", "\n"), (at, 101), ha="center", va="bottom",
                        fontsize=10)
    ax.set(xticks=bits, yticks=range(80, 101, 5), ylim=(80, 106),
           xlim=(bits[0] - 0.28, bits[-1] + 0.28),
           xlabel="bits a weight, scales and offsets included", ylabel="exact match, %")
