"""A tokenizer of sixty real words for the tiny models, and editors that ask with the text."""

from __future__ import annotations

from typing import Any

from grace_edit import GraceConfig, GraceEditor
from text_maps import map_of
from tiny_models import FIRST, LAYERS, VOCAB

SPECIAL = ["<pad>", "<bos>", "<eos>", "<mask>"]
_SENTENCES = """
one two three four five six seven eight nine ten <user> <assistant> <end> Zanzibar Quito Oslo
The capital city of Australia Austria France Peru is the What Who wrote It rained. Mr. Smith works
in lives Yesterday he said author king name called now a book. Then we ate. and or red blue green
new east north south .
"""
WORDS = _SENTENCES.split()
QUESTION = "The capital of Australia is"
REWORDED = "Yesterday he rained. The capital city of Australia is"
NEIGHBOUR = "The capital of Austria is"
OTHER = "The author called Smith wrote"
TWO_SPANS = "The king said Mr. Smith works in"
HASTY = "Smith works in"
TARGET = " ".join(WORDS[2:5])

CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
assert len(WORDS) <= VOCAB - FIRST, len(WORDS)


def tokenizer() -> Any:
    """Return a tokenizer that knows `WORDS` and nothing else; it pads on the left."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *WORDS]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<mask>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, padding_side="left", chat_template=CHAT, **names
    )


def text_editor(model: Any, name: str, words: Any = None, **config: Any) -> GraceEditor:
    """Attach an editor with `query="text"` and a map of the model's own embeddings."""
    words = words or tokenizer()
    config.setdefault("text_map", map_of(model, words))
    return GraceEditor(model, words, GraceConfig(layer=LAYERS[name], query="text", **config))
