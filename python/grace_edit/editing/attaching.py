"""A layer that is to be edited: an adaptor and an empty codebook, as a configuration says."""

from __future__ import annotations

from ..adaptor.adaptor import GraceAdaptor
from ..adaptor.text_queries import TextQueries
from ..codebook.codebook import Codebook
from ..config import GraceConfig
from ..families import Family
from ..keys.choice import text_keys
from ..keys.prompts import PromptReader
from .making import EditMaker


def attach_new(family: Family, config: GraceConfig, *, further: bool = False) -> None:
    """Attach an adaptor with an empty codebook as a configuration says.

    Args:
        further: other layers of the model carry adaptors.

    Raises:
        ValueError: as a new `GraceEditor`; the model is then as it was.
    """
    tokenizer = family.tokenizer
    default_query, default_replace = family.asks_by(config.layer)
    replace = config.replace or default_replace
    if config.recipe == "paper" and config.replace in (None, "prompt"):
        replace = "before"
    query = config.query or default_query
    text = None
    if query == "text":
        if tokenizer is None:
            raise ValueError('tokenizer must be given for query="text", got None')
        keys = text_keys(family.model, tokenizer, config.encoder, config.text_map)
        text = TextQueries(keys, PromptReader(tokenizer))
    asks_at_mask = query == "last" or (query == "text" and replace == "last")
    adaptor = GraceAdaptor(
        Codebook(1, 1),  # until the layer has shown its widths
        query=query,
        replace=replace,
        special_ids=family.special_ids if query == "mean" else (),
        mask_token_id=family.mask_token_id if asks_at_mask else None,
        text=text,
    )
    family.attach(config.layer, adaptor, further=further)
    try:
        with family.working():
            adaptor.codebook = EditMaker(family, config).new_codebook(config.capacity)
    except BaseException:
        family.detach(alone=True)
        raise
