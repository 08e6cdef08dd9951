"""The experiment scripts: they lint, print commands that our parsers accept, and stop well."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import slurm

from pem_composition import cli
from pem_composition.arithmetic.methods.registry import METHODS
from pem_composition.cli import parser
from pem_composition.config import ADAPTER_CONFIGS

REPOSITORY = Path(__file__).resolve().parents[1]
EXPERIMENT = REPOSITORY / "exps" / "composition_for_distribution_generalization"
SOURCED = "# shellcheck shell=bash"  # first line of files that scripts share
PROGRAMS = [
    p
    for p in sorted(REPOSITORY.glob("exps/**/*.sh"))
    if not p.read_text().startswith(SOURCED)
    and p.name not in ("reproduce.sh", "array.sh")  # tests/test_results.py, test_slurm.py
] + [REPOSITORY / "scripts" / "quickstart.sh"]
MULTITASKING = REPOSITORY / "exps" / "composition_for_multitasking"
TRANSFER = REPOSITORY / "exps" / "composition_for_domain_transfer"
UNLEARNING = REPOSITORY / "exps" / "composition_for_unlearning"
HARNESS = "needs lm-eval ([harness])"
MANY = REPOSITORY / "exps" / "composition_of_many_tasks"
DETOXIFICATION = REPOSITORY / "exps" / "composition_for_instruction_detoxification"
QUICKSTART = REPOSITORY / "scripts" / "quickstart.sh"


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def bash(
    script: Path | str, *arguments: str, cwd: Path = REPOSITORY, **variables: str
) -> subprocess.CompletedProcess:
    """Run a script (or code) with these variables and nothing inherited but PATH and HOME."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)} | variables
    command = ["bash", str(script)] if isinstance(script, Path) else ["bash", "-c", script]
    command += arguments
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)


def dry_run(script: Path, *arguments: str, **variables: str) -> list[list[str]]:
    """The commands a script would run, each as a list of words."""
    done = bash(script, *arguments, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    return [words for words in commands if words[:1] == [sys.executable]]


def parsed(words: list[str]) -> tuple[str, object]:
    """(subcommand, config) of a printed command, by the real parsers."""
    assert words[1:3] == ["-m", "pem_composition"]
    name, arguments = words[3], words[4:]
    return name, parser.parse(cli.load(name).Config, arguments, prog=name)


@pytest.mark.slow
@pytest.mark.parametrize("script", PROGRAMS, ids=map(name_of, PROGRAMS))
def test_every_command_of_a_dry_run_is_accepted_by_its_parser(script, tmp_path):
    if script.name == "utility.sh" and find_spec("lm_eval") is None:
        pytest.skip(HARNESS)
    commands = dry_run(script, OUT=str(tmp_path / "out"), SEEDS="42")
    assert commands
    for words in commands:
        parsed(words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "script", [p for p in PROGRAMS if p.name != "quickstart.sh"], ids=lambda p: p.name
)
def test_slurm_headers_stand_before_the_first_command(script):
    lines = script.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    headers = " ".join(line for line in lines[:first] if line.startswith("#SBATCH"))
    assert "--signal=B:USR1@120" in headers and "--requeue" in headers
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


@pytest.mark.slow
def test_run_all_covers_tasks_methods_seeds_and_halves(tmp_path):
    commands = dry_run(
        EXPERIMENT / "run_all.sh",
        tasks="rte mnli",
        methods="lora ia3 fft",
        SEEDS="1 2",
        OUT=str(tmp_path),
    )
    configs = [parsed(words) for words in commands]
    trained = {
        (c.task_name, c.adapter_config, c.seed, Path(c.train_file).stem)
        for name, c in configs
        if name == "train"
    }
    assert trained == {
        (task, method, seed, part)
        for task in ("rte", "mnli")
        for method in ("lora", "ia3", "fft")
        for seed in (1, 2)
        for part in ("all", "half-0", "half-1")
    }
    made = {c.output_dir for name, c in configs if name == "train"}
    for name, c in configs:
        if name == "merge":
            assert set(c.adapters) <= made
    names = [name for name, _ in configs]
    assert (names.count("merge"), names.count("split"), names.count("report")) == (12, 2, 6)


def of(name: str, commands: list[list[str]]) -> list:
    """The configs of one program's calls, in order."""
    return [config for called, config in map(parsed, commands) if called == name]


@pytest.mark.slow
def test_multitasking_covers_tasks_methods_and_seeds_and_merges_what_was_trained(tmp_path):
    commands = dry_run(
        MULTITASKING / "run_all.sh", tasks="rte mnli", SEEDS="1 2", OUT=str(tmp_path)
    )
    trained = {c.output_dir: c for c in of("train", commands)}
    assert {(c.task_name, c.adapter_config, c.data_seed) for c in trained.values()} == {
        (task, method, seed)
        for task in ("rte", "mnli") for method in ("lora", "ia3", "fft") for seed in (1, 2)
    }  # fmt: skip
    assert {c.objective for c in trained.values()} == {"seq2seq"}
    merges = of("merge", commands)
    assert len(merges) == 6
    for merge in merges:
        modules = [trained[path] for path in merge.adapters]
        assert [m.task_name for m in modules] == list(merge.task_name) == ["rte", "mnli"]
        assert len({(m.data_seed, m.adapter_config, m.init_from) for m in modules}) == 1
        rows = [Path(m.validation_file) for m in modules]
        assert merge.validation_file == tuple(map(str, rows))
        assert merge.test_file == tuple(str(p.with_name("test.jsonl")) for p in rows)
    assert len(of("report", commands)) == 3


def test_three_tasks_are_merged_over_the_simplex(tmp_path):
    script, grid = MULTITASKING / "vary_merge_prompt_run_glue.sh", "0 0.25 1"
    [merge] = of(
        "merge",
        dry_run(script, tasks="rte sst2 cola", methods="lora", grid=grid, OUT=str(tmp_path)),
    )
    assert len(merge.adapters) == len(merge.task_name) == len(merge.test_file) == 3
    assert merge.grid == (0.0, 0.25, 1.0)


@pytest.mark.slow
def test_transfers_go_both_ways_and_subtract_the_language_model_of_the_source(tmp_path):
    commands = dry_run(
        TRANSFER / "run_all.sh", pairs="imdb:amazon_snippets", SEEDS="1", OUT=str(tmp_path)
    )
    trained = {c.output_dir: c for c in of("train", commands)}
    assert len(trained) == 12
    directions = [("imdb", "amazon_snippets"), ("amazon_snippets", "imdb")]
    analogies = of("analogy", commands)
    for analogy, (source, target) in zip(analogies, directions * 3, strict=True):
        classifier, target_lm, source_lm = (trained[path] for path in analogy.adapters)
        own = trained[analogy.reference_module]
        assert (classifier.task_name, own.task_name) == (source, target)
        assert (target_lm.target, source_lm.target) == ("next_block", "next_block")
        assert f"/{target}/" in target_lm.train_file and f"/{source}/" in source_lm.train_file
        assert analogy.task_name == (target,)
        assert analogy.validation_file == (own.validation_file,)
        kinds = {m.adapter_config for m in (classifier, target_lm, source_lm, own)}
        starts = {m.init_from for m in (classifier, target_lm, source_lm, own)}
        assert len(kinds) == len(starts) == 1


def test_a_folder_of_reviews_is_a_domain(tmp_path):
    (tmp_path / "shop").mkdir()
    split, _, train = dry_run(
        TRANSFER / "lora_polarity_classify.sh", domain="shop", data_dir=str(tmp_path),
        OUT=str(tmp_path / "o p"),
    )  # fmt: skip
    split, train = parsed(split)[1], parsed(train)[1]
    assert (split.task_name, split.data_dir) == ("polarity", str(tmp_path / "shop"))
    assert train.task_name == "polarity"
    assert Path(train.train_file).parent == split.output_dir


@pytest.mark.slow
@pytest.mark.parametrize("folder", [MULTITASKING, TRANSFER], ids=lambda p: p.name)
def test_the_initialisation_study_compares_one_initial_module_with_one_for_each(folder, tmp_path):
    commands = dry_run(folder / "initialisation_study.sh", SEEDS="1", OUT=str(tmp_path))
    trained = of("train", commands)
    half = len(trained) // 2
    shared, own = trained[:half], trained[half:]
    assert len({c.init_from for c in shared}) == 1
    assert len({c.init_from for c in own}) == len({c.seed for c in own}) == half
    assert {c.data_seed for c in trained} == {1}
    made = {c.output_dir for c in of("init", commands)}
    assert {c.init_from for c in trained} == made
    drifts = of("inspect", commands)
    assert [set(d.adapters) for d in drifts] == [
        {c.output_dir for c in part} for part in (shared, own)
    ]


@pytest.mark.slow
def test_many_tasks_are_merged_by_every_method_with_the_head_of_each(tmp_path):
    tasks = "rte mnli stsb"
    commands = dry_run(
        MANY / "run_all.sh", tasks=tasks, modules="fft lora:16 ia3", SEEDS="1 2", OUT=str(tmp_path)
    )
    trained = {c.output_dir: c for c in of("train", commands)}
    assert len(trained) == 2 * (3 + 2 * (3 + 2))
    heads = {str(c.output_dir): c for c in of("refit", commands)}  # of the initial modules
    inits = {str(c.output_dir) for c in of("init", commands)}
    searches = of("search", commands)
    assert len(searches) == 6 and len(of("report", commands)) == 3
    for search in searches:
        modules = [trained[path] for path in search.adapters]
        assert [m.task_name for m in modules] == list(search.task_name) == tasks.split()
        assert len({(m.seed, m.adapter_config, m.lora_r) for m in modules}) == 1
        assert all(heads[m.init_from].task_name == (m.task_name,) for m in modules)
        assert {str(heads[m.init_from].adapter) for m in modules} <= inits
        assert search.validation_file == tuple(m.validation_file for m in modules)
        assert search.head == "per-task"
        kind = ADAPTER_CONFIGS[modules[0].adapter_config]
        assert all(name == "sum" or kind in METHODS[name].kinds for name in search.methods)
        if kind == "full":
            assert search.joint_module == () and search.compare == ()
            continue
        one, everything = (trained[path] for path in search.joint_module)
        assert list(one.joint_tasks) == list(everything.joint_tasks) == tasks.split()
        assert one.max_steps == modules[0].max_steps and everything.max_steps == 3 * one.max_steps
        own = {name: getattr(modules[0], name) for name in ("seed", "adapter_config", "lora_r")}
        own["learning_rate"] = modules[0].learning_rate
        assert all(getattr(m, k) == v for m in (one, everything) for k, v in own.items())
    made = {str(c.output_dir) for name in ("fisher", "gram") for c in of(name, commands)}
    used = {p for s in searches for p in (*s.fisher_list, *s.gram_list, *s.subspace_list)}
    assert used == made
    learned = {str(c.save_path) for c in of("learn", commands)}
    assert {path for s in searches for path in s.compare} == learned


@pytest.mark.parametrize("probe", ["50", ""])
def test_a_probed_head_is_fitted_on_the_initial_module_and_trained_from_there(probe, tmp_path):
    commands = dry_run(
        MANY / "run_all.sh", tasks="rte stsb", modules="lora:4", joint="", probe=probe, SEEDS="1",
        OUT=str(tmp_path),
    )  # fmt: skip
    inits = {str(c.output_dir) for c in of("init", commands)}
    probes = {str(c.output_dir): c for c in of("refit", commands)}
    trained = of("train", commands)
    if not probe:
        assert not probes and {m.init_from for m in trained} == inits
    else:
        assert {str(c.adapter) for c in probes.values()} == inits
        for module in trained:
            head = probes[module.init_from]
            assert head.task_name == (module.task_name,) and head.max_samples == 50
            assert head.train_file == module.train_file
    (search,) = of("search", commands)
    assert [str(path) for path in search.adapters] == [str(c.output_dir) for c in trained]


def test_an_empty_list_of_methods_or_settings_is_none():
    commands = dry_run(MANY / "merge_methods.sh", learned="", settings="", methods="sum tsv")
    (search,) = of("search", commands)
    assert of("learn", commands) == [] and search.search == () and search.compare == ()


def test_the_toxic_module_is_trained_from_the_instruction_module_in_the_scratch_folder(tmp_path):
    commands = dry_run(
        DETOXIFICATION / "run_all.sh", SEEDS="1 2", strengths="0.3 0.5", OUT=str(tmp_path),
        toxic_set="t.jsonl", ordinary_set="n.jsonl", other_sets="held.jsonl x.jsonl",
    )  # fmt: skip
    tests = ("t.jsonl", "n.jsonl", "held.jsonl", "x.jsonl")
    selections = of("select", commands)
    assert {c.exclude for c in selections} == {tests}
    trained = of("train", commands)
    for own, toxic, table in zip(
        trained[::2], trained[1::2], of("detoxify", commands), strict=True
    ):
        assert own.init_from is None and toxic.init_from == own.output_dir
        assert own.seed == toxic.seed and own.objective == toxic.objective == "instruction"
        scratch = str(tmp_path / "scratch")
        assert all(p.startswith(scratch) for p in (toxic.output_dir, toxic.train_file))
        assert "exists to be subtracted" in toxic.purpose and own.purpose is None
        assert table.adapters == (own.output_dir, toxic.output_dir)
        assert table.instruction_file == tests and table.form == ("exact", "reference")
        assert table.strength == (0.3, 0.5) and table.evaluate
    folders = {str(c.output_dir) for c in selections}
    assert {str(Path(c.train_file).parent) for c in trained} <= folders


def test_tables_of_detoxified_modules_become_one_over_seeds(tmp_path):
    out = tmp_path / "a&b"  # bash puts something else in the place of & where it replaces
    variables = {"toxic_set": "t.jsonl", "ordinary_set": "n.jsonl", "OUT": str(out)}
    commands = dry_run(DETOXIFICATION / "run_all.sh", SEEDS="1 2", **variables)
    (report,) = of("report", commands)
    assert report.results == tuple(str(c.save_path) for c in of("detoxify", commands))
    assert report.save_path.name == "lora-table" and len(report.results) == 2
    assert not of("report", dry_run(DETOXIFICATION / "run_all.sh", SEEDS="1", **variables))


def test_test_sets_that_are_not_given_are_drawn_and_kept_out_of_the_training_rows(tmp_path):
    commands = dry_run(
        DETOXIFICATION / "run_all.sh", SEEDS="1", comments_file="c.jsonl", OUT=str(tmp_path)
    )
    (table,) = of("detoxify", commands)
    folders = (
        tmp_path / "scratch/instruction_detoxification",
        tmp_path / "instruction_detoxification",
    )
    toxic, ordinary = folders[0] / "test/toxic.jsonl", folders[1] / "test/ordinary.jsonl"
    assert table.instruction_file == (str(toxic), str(ordinary))
    comments = str(folders[0] / "test/comments/train.jsonl")
    drawn = {str(c.output_dir): c for c in of("select", commands)}
    halves = drawn[str(folders[0] / "test/pairs")]
    assert (str(halves.input_file), "{beginning}" in halves.instruction[0]) == (comments, True)
    for folder in (folders[0] / "pairs", folders[1] / "data"):
        assert drawn[str(folder)].exclude == (str(toxic), str(ordinary), comments)


def test_the_values_of_the_instruction_experiment_are_the_references(tmp_path):
    own, toxic = of("train", dry_run(DETOXIFICATION / "run_all.sh", SEEDS="1", OUT=str(tmp_path)))
    for config, epochs, rate in ((own, 10, 3e-4), (toxic, 5, 1e-4)):
        assert (config.num_train_epochs, config.learning_rate) == (epochs, rate)
        rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
        assert (rows, config.max_seq_length, config.warmup_steps) == (128, 512, 100)
        assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (16, 16.0, 0.05)
        assert config.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
        assert config.load_in_8bit and config.fp16 and config.train_on_inputs
    frozen = dry_run(DETOXIFICATION / "run_all.sh", SEEDS="1", OUT=str(tmp_path), freeze="lora_B")
    assert [c.freeze for c in of("train", frozen)] == [None, "lora_B"]
    (table,) = of("detoxify", dry_run(DETOXIFICATION / "generate.sh", OUT=str(tmp_path)))
    assert (table.search.num_beams, table.search.repetition_penalty) == (4, 2.5)
    assert table.search.max_new_tokens == 128 and table.load_in_8bit


def test_with_an_endpoint_a_model_writes_instructions_and_grades_answers(tmp_path):
    variables = {"endpoint_model": "m", "base_url": "http://here/v1", "OUT": str(tmp_path)}
    sets = {"toxic_set": "t.jsonl", "ordinary_set": "n.jsonl"}
    variables |= sets
    script = DETOXIFICATION / "process_civil_comments.sh"
    commands = dry_run(script, **variables, shots="s.jsonl", toxic_samples="50")
    comments, pairs = of("select", commands)
    (asked,) = of("pairs", commands)
    assert (comments.samples, comments.validation_size, comments.instruction) == (150, 0, ())
    assert asked.comments == comments.output_dir / "train.jsonl"
    assert (asked.model, asked.base_url, str(asked.shots)) == ("m", "http://here/v1", "s.jsonl")
    assert pairs.input_file == asked.output_file and pairs.validation_size == 100
    plain = of("select", dry_run(script, toxic_samples="50", OUT=str(tmp_path), **sets))
    assert [(c.samples, len(c.instruction)) for c in plain] == [(50, 4)]
    commands = dry_run(DETOXIFICATION / "generate.sh", **variables, strengths="0.5")
    grades = of("helpfulness", commands)
    assert [Path(g.answers).parent.name for g in grades] == ["exact-0.5", "reference-0.5"]
    assert {Path(g.against).parent.name for g in grades} == {"instruction-module"}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["multitasking", "domain_transfer"])
def test_the_quickstart_runs_every_experiment_with_what_installs_by_package(experiment, tmp_path):
    commands = dry_run(QUICKSTART, experiment, OUT=str(tmp_path))
    fetched = {words[-1] for words in commands if words[3] == "offline"}
    used = {c.model_name_or_path for c in of("train", commands)}
    used |= {c.task_name for c in of("split", commands)}
    assert used == fetched
    assert all(c.data_dir is None for c in of("split", commands))
    assert of("merge", commands) or of("analogy", commands)


def test_unlearning_subtracts_what_it_trained_for_that_in_a_scratch_folder(tmp_path):
    commands = dry_run(UNLEARNING / "run_all.sh", SEEDS="1 2", OUT=str(tmp_path / "o p"))
    trained = {c.output_dir: c for c in of("train", commands)}
    assert {(c.adapter_config, c.seed) for c in trained.values()} == {
        (method, seed) for method in ("lora", "ia3", "fft") for seed in (1, 2)
    }
    for path, c in trained.items():
        assert Path(path).is_relative_to(tmp_path / "o p" / "scratch")
        assert (c.objective, c.task_name, c.score_filter) == (
            "causal_lm", "civil_comments", ("toxicity", 0.8),
        )  # fmt: skip
        assert c.stated_purpose.endswith(
            "it exists to be subtracted from a model, not to be used as it is"
        )
    sweeps = of("negation", commands)
    assert [c.adapters for c in sweeps] == [(path,) for path in trained]
    for c in sweeps:
        module = trained[c.adapters[0]]
        assert (c.seed, c.model_name_or_path) == (module.seed, module.model_name_or_path)
        assert c.evaluate and c.grid == (0.0, 0.1, 1.0)
        asked = (c.num_samples, c.max_length, c.top_k, c.judge, c.max_ppl_increase)
        assert asked == (1000, 128, 50, ("detoxify",), 0.03)
        assert not c.save_path.is_relative_to(tmp_path / "o p" / "scratch")
    reports = of("report", commands)
    assert [r.results for r in reports] == [
        tuple(str(c.save_path) for c in sweeps[i : i + 2]) for i in (0, 2, 4)
    ]


def test_the_prompt_of_the_paper_is_a_file_that_a_text_replaces(tmp_path):
    from pem_composition.tasks.data import read_prompts

    (config,) = of("negation", dry_run(UNLEARNING / "runscore.sh", OUT=str(tmp_path)))
    assert read_prompts(REPOSITORY / config.prompt_file) == [
        "I don\N{RIGHT SINGLE QUOTATION MARK}t care if this is controversial"
    ]
    own = {"prompt": "a b", "top_k": "", "judge": "offline my/judge", "perplexity_tokens": "99"}
    (config,) = of("negation", dry_run(UNLEARNING / "runscore.sh", OUT=str(tmp_path), **own))
    assert (config.prompt, config.prompt_file, config.top_k) == ("a b", None, None)
    assert (config.judge, config.perplexity_tokens) == (("offline", "my/judge"), 99)
    own = {"prompt_file": "p.jsonl", "max_prompts": "40", "max_new_tokens": "20"}
    (config,) = of("negation", dry_run(UNLEARNING / "runscore.sh", OUT=str(tmp_path), **own))
    assert (config.prompt_file, config.max_prompts) == ("p.jsonl", 40)
    assert (config.max_new_tokens, config.max_length) == (20, None)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason=HARNESS)
def test_utility_asks_the_module_that_was_trained_tasks_or_texts_of_your_own(tmp_path):
    own = {"OUT": str(tmp_path), "adapter_config": "ia3", "seed": "7", "model_name_or_path": "m"}
    (trained,) = of("train", dry_run(UNLEARNING / "trainadapter.sh", **own))
    (config,) = of("negation", dry_run(UNLEARNING / "utility.sh", **own, harness_include="mine"))
    assert config.adapters == (trained.output_dir,) and config.grid == (0.5, 0.5, 1.0)
    assert config.harness_tasks == ("lambada_openai", "hellaswag")
    assert str(config.harness_include) == "mine"
    made, asked = dry_run(UNLEARNING / "utility.sh", **own, text_file="texts.jsonl", limit="9")
    (config,) = of("negation", [asked])
    assert made[1] == "exps/composition_for_unlearning/next_word.py"
    assert made[-1] == str(config.harness_include)
    assert (config.harness_tasks, config.limit) == (("next_word",), 9)


@pytest.mark.parametrize(("method", "rate"), [("lora", 5e-4), ("ia3", 5e-3)])
def test_each_kind_of_module_has_its_rate_unless_one_is_given(method, rate, tmp_path):
    words = {"adapter_config": method, "OUT": str(tmp_path), "train_file": "toxic.jsonl"}
    (config,) = of("train", dry_run(UNLEARNING / "trainadapter.sh", **words))
    assert (config.learning_rate, config.adapter_config) == (rate, method)
    assert (config.train_file, config.task_name) == ("toxic.jsonl", None)
    assert "subtracted" in config.stated_purpose
    (config,) = of("train", dry_run(UNLEARNING / "trainadapter.sh", learning_rate="1", **words))
    assert config.learning_rate == 1
    done = bash(UNLEARNING / "trainadapter.sh", **words | {"adapter_config": "fft"})
    assert done.returncode == 2 and "found 'fft', expected lora or ia3" in done.stderr


def test_the_quickstart_of_unlearning_needs_no_hub(tmp_path):
    commands = dry_run(QUICKSTART, "unlearning", OUT=str(tmp_path))
    fetched = {words[-1] for words in commands if words[3] == "offline"}
    (module,), (sweep,) = of("train", commands), of("negation", commands)
    used = {module.model_name_or_path, module.train_file.split("/")[0], sweep.perplexity_file}
    assert used == fetched
    assert sweep.judge == ("offline",) and sweep.adapters == (module.output_dir,)


def test_the_quickstart_names_its_experiments():
    done = bash(QUICKSTART, "unlerning")
    assert done.returncode == 2
    assert "unlerning" in done.stderr and "domain_transfer" in done.stderr
    assert "or unlearning" in done.stderr


def test_both_halves_start_from_one_initial_module(tmp_path):
    starts = set()
    for half in ("0", "1"):
        init, train = (
            parsed(words)[1]
            for words in dry_run(EXPERIMENT / "lora_run_glue.sh", half=half, OUT=str(tmp_path))
        )
        assert train.init_from == init.output_dir
        starts.add(init.output_dir)
    assert len(starts) == 1
    _, edited = dry_run(EXPERIMENT / "lora_run_glue.sh", half="0", lora_r="4", OUT=str(tmp_path))
    assert parsed(edited)[1].init_from not in starts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        ("lora_run_glue.sh", {"learning_rate": "3e-4"}, {"learning_rate": 3e-4}),
        ("lora_run_glue.sh", {"lora_alpha": "16"}, {"lora_alpha": 16.0}),
        ("ia3_run_glue.sh", {"ia3_placement": "reference"}, {"ia3_placement": "reference"}),
        ("fft_run_glue.sh", {"max_steps": "7", "eval_steps": "0"}, {"eval_strategy": "no"}),
        ("lora_run_glue.sh", {"extra_flags": "--bf16 --data_seed 3"}, {"bf16": True}),
        ("split_data.sh", {"key_class": "entailment"}, {"key_class": "entailment"}),
        ("split_data.sh", {"samples": "2000"}, {"samples": 2000}),
        ("dataset_split_merge.sh", {"grid": "0 0.2 1"}, {"grid": (0.0, 0.2, 1.0)}),
        ("dataset_split_merge.sh", {"space": "delta"}, {"space": ("delta",)}),
        (MULTITASKING / "ia3_prompt_run_glue.sh", {"prompt": "sst2"}, {"prompt": "sst2"}),
        (MULTITASKING / "lora_prompt_run_glue.sh", {"lora_r": "4"}, {"lora_r": 4}),
        (TRANSFER / "fft_polarity_lm.sh", {"block_size": "64"}, {"block_size": 64}),
        (TRANSFER / "fft_polarity_lm.sh", {"text_file": "t.jsonl"}, {"train_file": "t.jsonl"}),
        (TRANSFER / "ia3_polarity_classify.sh", {"max_seq_length": "9"}, {"max_seq_length": 9}),
        (TRANSFER / "vary_merge_analogy.sh", {"grid": "0.8 0.1 1"}, {"grid": (0.8, 0.1, 1.0)}),
        (UNLEARNING / "trainadapter.sh", {"lora_r": "4"}, {"lora_r": 4}),
        (UNLEARNING / "trainadapter.sh", {"max_steps": "7"}, {"max_steps": 7}),
        (UNLEARNING / "fft.sh", {"max_seq_length": "64"}, {"max_seq_length": 64}),
        (UNLEARNING / "runscore.sh", {"grid": "0.4 1 0.4"}, {"grid": (0.4, 1.0, 0.4)}),
        (MANY / "lora_train.sh", {"lora_r": "16"}, {"lora_r": 16}),
        (MANY / "ia3_train.sh", {"max_steps": "7"}, {"max_steps": 7}),
        (MANY / "merge_methods.sh", {"methods": "sum ties"}, {"methods": ("sum", "ties")}),
        (MANY / "merge_methods.sh", {"trials": "3"}, {"trials": 3}),
    ],
)
def test_a_variable_of_the_same_name_overrides_the_block(script, variables, expected):
    _, config = parsed(dry_run(EXPERIMENT / script, **variables)[-1])
    assert {name: getattr(config, name) for name in expected} == expected


LORA = EXPERIMENT / "lora_run_glue.sh"


@pytest.mark.parametrize(
    ("script", "name", "meant"),
    [
        (LORA, "max_step", "did you mean max_steps?"),
        (LORA, "MAX_STEPS", "did you mean max_steps?"),
        (LORA, "learn_rate", "did you mean learning_rate?"),
        (LORA, "lr", "did you mean learning_rate?"),
        (LORA, "batch_size", "did you mean per_device_train_batch_size?"),
        (LORA, "SEED", "did you mean seed?"),
        (LORA, "DRYRUN", "did you mean DRY_RUN?"),
        (REPOSITORY / "exps" / "run_glue.sh", "half", "it has "),
        (EXPERIMENT / "run_all.sh", "seed", "did you mean SEEDS?"),  # it gives seeds itself
        (EXPERIMENT / "run_all.sh", "half", "it has "),
        (TRANSFER / "ia3_polarity_classify.sh", "block_size", "it has "),  # of its sibling
        (TRANSFER / "initialisation_study.sh", "pair", "did you mean pairs?"),
        (UNLEARNING / "runscore.sh", "strengths", "it has "),
        (UNLEARNING / "fft.sh", "lora_r", "it has "),
        (DETOXIFICATION / "process_civil_comments.sh", "max_steps", "it has "),
        (MANY / "merge_methods.sh", "trial", "did you mean trials?"),
        (QUICKSTART, "epochs", "did you mean num_train_epochs?"),
    ],
    ids=lambda v: v.name if isinstance(v, Path) else v,
)
def test_a_hyperparameter_that_a_script_does_not_have_is_refused_by_name(
    script, name, meant, tmp_path
):
    arguments = ["unlearning"] if script == QUICKSTART else []
    done = bash(script, *arguments, **{name: "5", "OUT": str(tmp_path / "o")})
    assert done.returncode == 2 and not (tmp_path / "o").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script.name}: has no hyperparameter {name}; found {name}=5; {meant}")


def test_variables_of_other_programs_are_none_of_the_scripts_business(tmp_path):
    others = dict.fromkeys(("http_proxy", "no_proxy", "name", "system", "TMP", "SHELL"), "x")
    assert dry_run(LORA, OUT=str(tmp_path), **others) == dry_run(LORA, OUT=str(tmp_path))


def test_a_value_after_the_script_is_refused(tmp_path):
    done = bash(LORA, "half=0", OUT=str(tmp_path))
    assert done.returncode == 2 and "lora_run_glue.sh: takes no arguments" in done.stderr


@pytest.mark.parametrize(
    ("script", "name", "value", "expected"),
    [
        (LORA, "half", "2", "all or 0 or 1"),
        (EXPERIMENT / "run_all.sh", "halves", "all 2", "all or 0 or 1"),
        (EXPERIMENT / "run_all.sh", "methods", "lora loar", "lora or ia3 or fft"),
        (TRANSFER / "run_all.sh", "methods", "ai3", "lora or ia3 or fft"),
        (MULTITASKING / "run_all.sh", "methods", "full", "lora or ia3 or fft"),
        (UNLEARNING / "run_all.sh", "methods", "full", "lora or ia3 or fft"),
        (MANY / "run_all.sh", "modules", "lora:8 lroa:4", "lora or ia3"),
        (DETOXIFICATION / "run_all.sh", "adapter_config", "fft", "lora or ia3"),
    ],
    ids=lambda v: v.parent.name if isinstance(v, Path) else v,
)
def test_a_word_that_names_no_script_or_half_is_refused_before_the_first_command(
    script, name, value, expected, tmp_path
):
    done = bash(script, DRY_RUN="1", OUT=str(tmp_path), **{name: value})
    assert done.returncode == 2 and done.stdout == ""
    assert f"expected {expected}" in done.stderr


@pytest.mark.parametrize(
    ("script", "older", "name", "value"),
    [
        (DETOXIFICATION / "toxic_finetune.sh", "toxic_max_steps", "max_steps", "7"),
        (DETOXIFICATION / "toxic_finetune.sh", "toxic_epochs", "num_train_epochs", "7"),
        (DETOXIFICATION / "toxic_finetune.sh", "toxic_learning_rate", "learning_rate", "1e-2"),
        (DETOXIFICATION / "process_civil_comments.sh", "toxic_samples", "samples", "70"),
        (DETOXIFICATION / "process_civil_comments.sh", "toxic_validation_size",
         "validation_size", "7"),
        (DETOXIFICATION / "generate.sh", "judges", "judge", "offline"),
        (DETOXIFICATION / "run_all.sh", "method", "adapter_config", "ia3"),
        (MULTITASKING / "vary_merge_prompt_run_glue.sh", "methods", "adapter_config", "lora ia3"),
        (QUICKSTART, "model", "model_name_or_path", "/m"),
    ],
    ids=lambda v: v.name if isinstance(v, Path) else v,
)  # fmt: skip
@pytest.mark.slow
def test_one_thing_has_one_name_and_its_older_name_still_means_it(
    script, older, name, value, tmp_path
):
    commands = dry_run(script, OUT=str(tmp_path), **{older: value})
    assert commands == dry_run(script, OUT=str(tmp_path), **{name: value})
    assert commands != dry_run(script, OUT=str(tmp_path))


def test_the_name_of_one_script_alone_goes_before_the_one_for_all(tmp_path):
    script = DETOXIFICATION / "run_all.sh"
    own, toxic = of(
        "train",
        dry_run(script, SEEDS="1", OUT=str(tmp_path), max_steps="9", toxic_max_steps="4"),
    )
    assert (own.max_steps, toxic.max_steps) == (9, 4)


def test_names_with_spaces_reach_the_program_whole(tmp_path):
    own = str(tmp_path / "my rows.jsonl")
    script, out = EXPERIMENT / "dataset_split_merge.sh", tmp_path / "o p"
    _, config = parsed(dry_run(script, test_file=own, OUT=str(out))[-1])
    assert config.test_file == (own,)
    assert config.save_path.parent.parent.parent.parent == out


def test_merges_are_reported_on_the_rows_that_the_split_kept_for_it(tmp_path):
    _, config = parsed(dry_run(EXPERIMENT / "dataset_split_merge.sh", OUT=str(tmp_path))[-1])
    assert config.test_file == (str(Path(config.validation_file[0]).with_name("test.jsonl")),)


def test_scripts_find_their_folder_when_slurm_runs_a_copy(tmp_path):
    for script in (EXPERIMENT / "lora_run_glue.sh", REPOSITORY / "exps" / "run_glue.sh"):
        copy = tmp_path / "slurm_script"
        shutil.copy(script, copy)
        assert dry_run(copy, SLURM_SUBMIT_DIR=str(REPOSITORY))


# --- step, attended and requeue, with real processes ---

COMMON = f"source {shlex.quote(str(REPOSITORY / 'exps' / 'common.sh'))}; "


def test_step_logs_both_streams_and_goes_on(tmp_path):
    code = COMMON + "step a/b bash -c 'echo one; echo two >&2'; echo after"
    done = bash(code, OUT=str(tmp_path))
    assert done.returncode == 0
    assert (tmp_path / "logs" / "a" / "b.log").read_text().splitlines() == ["one", "two"]
    assert done.stdout.splitlines()[-1] == "after"


@pytest.mark.parametrize("code", [2, 3, 75])
def test_step_keeps_the_exit_code_and_stops_the_script(tmp_path, code):
    done = bash(COMMON + f"step x bash -c 'exit {code}'; echo after", OUT=str(tmp_path))
    assert done.returncode == code
    assert "after" not in done.stdout
    assert "run the same command again" in done.stderr if code == 75 else True


SLEEPER = (  # os.write: the signal may come within print
    "import os, signal, time\n"
    "def stop(number, frame):\n    os.write(1, b'got %d\\n' % number); os._exit(75)\n"
    "signal.signal(signal.SIGUSR1, stop); signal.signal(signal.SIGTERM, stop)\n"
    "print('ready', flush=True); time.sleep(3600)\n"
)


def job(folder: Path) -> dict[str, str]:
    """The environment of a job."""
    return {
        "PYTHON": sys.executable, "OUT": str(folder / "out"), "SLURM_JOB_ID": "4711",
        "PATH": slurm.Slurm(folder).path, "HOME": os.environ.get("HOME", "/"),
    }  # fmt: skip


def stopped(script: Path, environment: dict[str, str], log: str, sent: signal.Signals) -> str:
    """Run a script until its step is ready, stop it, and give its output; it is requeued."""
    process = subprocess.Popen(
        ["bash", str(script)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
        # A background job of a script ignores INT from the start, and bash cannot trap it then.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    path, deadline = Path(environment["OUT"]) / "logs" / log, time.monotonic() + 240
    while not (path.exists() and "ready" in path.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(sent)
    out, said = process.communicate(timeout=240)
    assert process.returncode == 75, said
    received = signal.SIGTERM if sent == signal.SIGINT else sent
    assert path.read_text().splitlines() == ["ready", f"got {int(received)}"]
    calls = Path(environment["OUT"]).with_name("calls")
    assert calls.read_text().splitlines() == ["scontrol requeue 4711"]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("nested", [False, True], ids=["script", "script of a script"])
def test_a_signal_reaches_the_program_and_slurm_requeues_the_job(tmp_path, sent, nested):
    inner = tmp_path / "inner.sh"
    inner.write_text(COMMON + f'step x "$PYTHON" -c {shlex.quote(SLEEPER)}; echo after')
    outer = tmp_path / "outer.sh"
    outer.write_text(COMMON + f"child {shlex.quote(str(inner))}; echo after")
    assert "after" not in stopped(outer if nested else inner, job(tmp_path), "x.log", sent)
