"""Which names are one parameter, told from names alone, against transformers' models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from support import one_meaning as om
from support import tiny_models as tiny

from pem_composition.checkpoint import combine_full, fold_checkpoint
from pem_composition.checkpoint.full import Weights
from pem_composition.checkpoint.stored_names import tied_names
from pem_composition.errors import IncompatibleModules
from pem_composition.safe_files import read_json

SIDES = {
    "vocab_size": om.V, "d_model": om.D, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": om.H, "decoder_attention_heads": om.H, "encoder_ffn_dim": om.F,
    "decoder_ffn_dim": om.F, "max_position_embeddings": 40, **om.SPECIAL,
}  # fmt: skip
OTHERS = {
    "electra discriminator": lambda: hf.ElectraForPreTraining(hf.ElectraConfig(**om.ENCODER)),
    "electra mlm": lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**om.ENCODER)),
    "bert decoder": lambda: hf.BertGenerationDecoder(
        hf.BertGenerationConfig(**om.ENCODER, **om.SPECIAL, is_decoder=True)
    ),
    "marian": lambda: hf.MarianMTModel(hf.MarianConfig(**SIDES)),
    "marian of two vocabularies": lambda: hf.MarianMTModel(
        hf.MarianConfig(
            **SIDES, share_encoder_decoder_embeddings=False, decoder_vocab_size=om.V + 3
        )
    ),
    "prophetnet": lambda: hf.ProphetNetForConditionalGeneration(
        hf.ProphetNetConfig(
            vocab_size=om.V, hidden_size=om.D, encoder_ffn_dim=om.F, decoder_ffn_dim=om.F,
            num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=om.H,
            num_decoder_attention_heads=om.H,
        )
    ),
}  # fmt: skip
BERT = {
    "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 20,
}  # fmt: skip
IMAGE = {"image_size": 8, "patch_size": 4}
UDOP = {
    "vocab_size": 24,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 12,
    "num_layers": 1,
    "num_heads": 2,
    **IMAGE,
}
SPEECH = {"hidden_size": 16, "conv_dim": [8], "conv_stride": [2], "conv_kernel": [3]}
BLIP = {"text_config": {**BERT, "encoder_hidden_size": 16}, "vision_config": {**BERT, **IMAGE}}
# class -> its sizes
CLASSES: dict[str, dict[str, Any]] = {
    "WhisperForConditionalGeneration": {**SIDES, "max_target_positions": 20},
    "PegasusForConditionalGeneration": SIDES,
    "M2M100ForConditionalGeneration": SIDES,
    "SpeechT5ForSpeechToText": {**SIDES, **SPEECH},
    "LukeForMaskedLM": {**BERT, "entity_vocab_size": 9, "entity_emb_size": 8},
    "BlipForConditionalGeneration": BLIP,
    "BlipForQuestionAnswering": BLIP,
    "UdopForConditionalGeneration": UDOP,
    "UdopEncoderModel": UDOP,
    "T5EncoderModel": UDOP,
    "ViltForMaskedLM": {**BERT, **IMAGE},
    "LlavaForConditionalGeneration": {
        "text_config": {**BERT, "model_type": "llama"},
        "image_token_index": 23,
        "vision_config": {**BERT, **IMAGE, "model_type": "clip_vision_model"},
    },
}


def of_class(name: str) -> Any:
    cls = getattr(hf, name)
    return cls(cls.config_class(**CLASSES[name]))


MODELS = {**{n: (lambda n=n: om.built(n)) for n in om.BY_NAME}, **tiny.BUILDERS, **OTHERS}
MODELS |= {n: partial(of_class, n) for n in CLASSES}


# Of each kind of tie one is quick; with all of them the law takes a second, most of it imports.
QUICK = {*tiny.QUICK, "llama tied", "t5 untied", "bert to gpt2", "marian of two vocabularies"}
QUICK |= {"LlavaForConditionalGeneration", "WhisperForConditionalGeneration"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MODELS]
)
def test_tied_names_are_what_transformers_ties(name: str, tmp_path: Path) -> None:
    """Every name that the file lacks, and no other, has the values of the stored one it shares."""
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    with Weights(tmp_path) as weights:
        stored = set(weights.infos)
    found = tied_names(read_json(tmp_path / "config.json", tmp_path), stored)
    live: dict[int, set[str]] = {}
    for n, p in model.named_parameters(remove_duplicate=False):
        live.setdefault(id(p), set()).add(n)
    lacking = {n for names in live.values() if names & stored for n in names - stored}
    assert {n for n in found if n not in stored} == lacking
    for copy, source in found.items():
        if copy not in stored:
            assert any({copy, source} <= names for names in live.values())


def test_a_tied_model_of_an_untied_base_is_refused_and_the_advice_is_true(tmp_path: Path) -> None:
    m = om.BY_NAME["llama"]
    base, tied = om.base_folder(m, tmp_path), om.base_folder(om.BY_NAME["llama tied"], tmp_path)
    with pytest.raises(IncompatibleModules, match=r"'lm_head\.weight' is tied to"):
        fold_checkpoint("a", {"a": tied}, base, tmp_path / "f", allow_base_mismatch=True)
    combine_full([base, tied], [0.0, 1.0], tmp_path / "written")
    written = {"a": tmp_path / "written"}
    fold_checkpoint("a", written, base, tmp_path / "f", allow_base_mismatch=True)
    want = om.output(om.opened(m, tied).eval(), m.inputs)
    assert om.difference(om.output(om.opened(m, tmp_path / "f").eval(), m.inputs), want) < 1e-6
