"""Token ids that a model has an embedding for."""

from collections.abc import Iterable


def check_tokens(model, ids: Iterable[int]) -> None:
    """Raises ValueError for a token id that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if (largest := max(ids, default=0)) >= rows:
        raise ValueError(
            f"token id {largest}, but the model has embeddings of {rows} tokens: the tokenizer is "
            "another model's, or tokens were added to it (model.resize_token_embeddings)"
        )
