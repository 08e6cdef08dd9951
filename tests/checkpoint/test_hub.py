"""Modules by hub name: the hub's own client against a server on 127.0.0.1 (support/hub_server.py).

The client reads its settings when it is imported, so that every test runs in processes of its own.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.hub_server import Hub, files_of, serve
from support.small_modules import lora

from pem_composition import PEM, combine, load, negate
from pem_composition.checkpoint import hub_name
from pem_composition.checkpoint.hub_name import Reference
from pem_composition.config import BaseIdentity, LoraConfig
from pem_composition.errors import CheckpointError
from pem_composition.record import Provenance, purpose_note

REPOSITORY = Path(__file__).resolve().parents[2]
# Forks for each line of input: torch is imported once, the client anew by each process.
SERVER = """
import contextlib, io, json, os, sys
import torch, pem_composition
from pem_composition.cli import main

pem_composition.PEM, pem_composition.load
assert "huggingface_hub" not in sys.modules
for line in sys.stdin:
    job = json.loads(line)
    if os.fork():
        os.wait()
        print(flush=True)
        continue
    os.environ.update(job["environment"])
    os.chdir(job["here"])
    done = []
    for argv in job["programs"]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(argv)
        done.append([code, out.getvalue(), err.getvalue()])
    with open(job["answer"], "w") as file:
        json.dump(done, file)
    os._exit(0)
"""


@functools.cache
def server() -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SERVER], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_server_stays() -> Iterator[None]:
    yield
    if server.cache_info().currsize:
        server().communicate()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    paths = (tmp_path / "made" / "a", tmp_path / "made" / "b")
    for seed, path in enumerate(paths):
        lora(seed).save(path)
    return paths


def pem(
    hub: Hub, here: Path, *programs: list[str], cache: str = "cache", **variables: str
) -> list[tuple[int, str, str]]:
    """Code, output and error of each program, all of them in one process in ``here``."""
    answer = here / "answer.json"
    environment = hub.environment(here / cache, **variables)
    job = {"programs": programs, "here": here, "environment": environment, "answer": answer}
    running = server()
    assert running.stdin and running.stdout
    running.stdin.write(json.dumps(job, default=str) + "\n")
    running.stdin.flush()
    assert running.stdout.readline(), "the server died"
    found = json.loads(answer.read_text())
    answer.unlink()
    return [tuple(program) for program in found]


def facts(found: tuple[int, str, str]) -> Any:
    """What ``pem inspect --json`` says of one module."""
    code, out, err = found
    assert code == 0, err
    return json.loads(out)


# --- names --------------------------------------------------------------------------------------

words = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,5}", fullmatch=True)
references = st.builds(
    Reference,
    st.builds("{}/{}".format, words, words),
    st.none() | words | st.just("refs/pr/7"),
    st.lists(words, max_size=3).map("/".join),
)


@given(references)
def test_a_name_means_what_it_says(reference):
    assert hub_name.parse(str(reference)) == reference
    assert hub_name.parse(str(reference).removeprefix("hf://")) == reference
    assert hub_name.parse(str(Path(str(reference)))) == reference  # one slash fewer


@given(references)
def test_the_revision_may_stand_last(reference):
    bare = Reference(reference.repository, None, reference.subfolder)
    revision = f"@{reference.revision}" if reference.revision else ""
    assert hub_name.parse(f"{bare}{revision}") == reference


@pytest.mark.parametrize("text", ["runs", "./a/b", "../a/b", "/a/b", "~/a/b", "a/../b", "a/b/", ""])
def test_paths_are_no_names(text):
    assert hub_name.parse(text) is None


@pytest.mark.parametrize("text", ["hf://a", "hf://a/b@", "hf://a/b@x/c@y", "hf://a/../b", "hf:a/b"])
def test_a_name_that_is_none_is_refused(text):
    with pytest.raises(CheckpointError, match="not the name of a module on the hub") as error:
        hub_name.parse(text)
    assert str(error.value).startswith(f"{text}:")


def test_a_mistyped_path_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name.reference("runs/a") == Reference("runs/a")
    (tmp_path / "runs").mkdir()
    assert hub_name.reference("runs/a") is None
    assert hub_name.reference("hf://runs/a") == Reference("runs/a")


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_by_name_revision_and_subfolder_and_again_without_the_hub(hub, folders, tmp_path):
    a, b = folders
    first = hub.put("org/name", a)
    hub.put("org/name", b)
    hub.put("org/many", {f"deep/er/{n}": d for n, d in files_of(a).items()})
    names = {
        "org/name": b, f"org/name@{first}": a, "hf://org/name@main": b,
        "org/many/deep/er": a, "hf://org/many@main/deep/er": a, "org/many/deep/er@main": a,
    }  # fmt: skip
    asked = [["inspect", name, "--json", "--values"] for name in (*names, *map(str, folders))]
    online = [facts(found) for found in pem(hub, tmp_path, *asked)]
    local = dict(zip(map(str, folders), online[-2:], strict=True))
    for told, folder in zip(online, names.values(), strict=False):
        assert {**told, "path": ""} == {**local[str(folder)], "path": ""}
    served = len(hub.asked)
    offline = pem(hub, tmp_path, *asked, HF_HUB_OFFLINE="1")
    assert [facts(found) for found in offline] == online
    assert len(hub.asked) == served


@pytest.mark.slow
def test_only_the_files_of_a_module_are_fetched(hub, folders, tmp_path):
    more = {"training.log": b"x", "optimizer.pt": b"x", "other/adapter_config.json": b"{}"}
    hub.put("org/name", files_of(folders[0]) | more)
    (found,) = pem(hub, tmp_path, ["inspect", "org/name"])
    assert found[0] == 0
    fetched = {a.rpartition("resolve/")[2].partition("/")[2] for a in hub.asked if "resolve" in a}
    assert fetched == files_of(folders[0]).keys()


@pytest.mark.slow
def test_a_sum_names_the_commits_and_is_rebuilt_from_them(hub, folders, tmp_path):
    a, b = folders
    commits = (
        hub.put("org/a", a),
        hub.put("org/many", {f"b/{n}": d for n, d in files_of(b).items()}),
    )
    local, remote = ["compose", "0.3*a - b"], ["compose", "0.3*a - b"]
    for name, path, online in (("a", a, "org/a"), ("b", b, "hf://org/many/b")):
        local += ["--module", f"{name}={path}"]
        remote += ["--module", f"{name}={online}"]
    for found in pem(hub, tmp_path, [*local, "-p", "local"], [*remote, "-p", "remote"]):
        assert found[0] == 0, found
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "local" / file).read_bytes() == (tmp_path / "remote" / file).read_bytes()
    record = json.loads((tmp_path / "remote" / "pem.json").read_text())
    assert [s["path"] for s in record["sources"]] == [
        f"hf://org/a@{commits[0]}", f"hf://org/many@{commits[1]}/b"
    ]  # fmt: skip
    hub.put("org/a", b)  # the branch goes on, the sum stays what it was
    (found,) = pem(hub, tmp_path, ["rebuild", "remote"], cache="another")
    assert found[0] == 0 and "equal, bit for bit" in found[1]
    (lost,) = pem(hub, tmp_path, ["rebuild", "remote"], cache="empty", HF_HUB_OFFLINE="1")
    assert lost[0] == 2 and f"hf://org/a@{commits[0]}: not wholly in the hub's cache" in lost[2]


@pytest.mark.slow
def test_results_depend_on_the_commit(hub, folders, tmp_path):
    code = "from pem_composition.evaluation.keys import module_digest as d; print(d('org/a'))"
    found = []
    for folder in (*folders, folders[0]):
        hub.put("org/a", folder)
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | hub.environment(tmp_path / "c")
        command = [sys.executable, "-c", code]
        found.append(subprocess.run(command, env=environment, capture_output=True, check=True))
    digests = [done.stdout for done in found]
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.slow
def test_a_download_that_was_cut_goes_on_where_it_stopped(hub, tmp_path):
    lora(0, r=8, size=(200_000, 7)).save(tmp_path / "large")  # the client keeps parts of 10 MB
    hub.put("org/a", tmp_path / "large")
    size = (tmp_path / "large" / "adapter_model.safetensors").stat().st_size
    hub.cut = [15_000_000]
    (found,) = pem(hub, tmp_path, ["check", "org/a", "--values", "--json"])
    assert found[0] == 0, found  # the recorded sha256 among its checks
    assert len(hub.sent) == 2 and hub.sent[0] == 15_000_000
    assert size - 15_000_000 <= hub.sent[1] < size


@pytest.mark.slow
def test_a_folder_wins_and_that_is_said(hub, folders, tmp_path):
    hub.put("made/a", folders[1])
    inspect = ["inspect", "made/a", "--json"]
    remote = facts(pem(hub, tmp_path, ["inspect", "hf://made/a", "--json"])[0])
    local = pem(hub, tmp_path, inspect, inspect)
    assert facts(local[0])["sha256"] != remote["sha256"]
    note = "note: made/a is the folder here; hf://made/a is on the hub\n"
    assert [found[2] for found in local] == [note, ""]  # once per process


@pytest.mark.slow
def test_what_cannot_be_read_is_refused_in_one_line(hub, folders, tmp_path):
    files = files_of(folders[0])
    hub.put("org/a", folders[0])
    hub.put("org/gated", folders[0], gated=True)
    hub.put("org/private", folders[0], private=True)
    hub.put("org/model", {"config.json": b"{}", "model.safetensors": b""})
    hub.put("org/rows", {"train.csv": b"a"}, kind="datasets")
    hub.put("org/empty", {"notes.txt": b""})
    hub.put("org/many", {f"x/{n}": d for n, d in files.items()})
    hub.put("org/half", {n: d for n, d in files.items() if n != "adapter_model.safetensors"})
    expected = {
        "org/none": "org/none: no such directory, and no such module on the hub, or a private one",
        "hf://org/none": "hf://org/none: no such module on the hub, or a private one; check the",
        "org/private": "or a private one; check the name, or set HF_TOKEN",
        "org/gated": "org/gated: the module is gated; expected a token of a user who was given",
        "org/a@v9": "no revision 'v9' of it on the hub; found main, expected a branch, a tag or",
        "org/a/x": "org/a/x: no module at this place; found modules elsewhere in org/a; name one "
        "of them: hf://org/a",
        "org/many": "name one of them: hf://org/many/x",
        "org/model": "org/model: a whole model; expected a module with adapter_config.json; give",
        "org/rows": "org/rows: a data set on the hub; expected a module; name a module",
        "org/empty": "no module in the repository; found notes.txt, expected adapter_config.json",
        "org/half": "no weights; found README.md, adapter_config.json, pem.json, expected",
    }
    asked = [["inspect", name] for name in expected]
    for said, (code, out, err) in zip(expected.values(), pem(hub, tmp_path, *asked), strict=True):
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    slip = tmp_path / "runs" / "ours"
    slip.parent.mkdir()
    slip.symlink_to(folders[0])
    (there,) = pem(hub, tmp_path, ["inspect", "rums/ours"])
    assert there[0] == 2 and "did you mean runs/ours? else check the name" in there[2]
    (offline,) = pem(hub, tmp_path, ["inspect", "rums/ours"], HF_HUB_OFFLINE="1")
    assert "did you mean runs/ours? else unset HF_HUB_OFFLINE" in offline[2]
    granted = [["inspect", "org/gated"], ["inspect", "org/private"]]
    for token, code in (("hf_right", 0), ("hf_wrong", 2)):
        found = pem(hub, tmp_path, *granted, cache=token, HF_TOKEN=token)
        assert [f[0] for f in found] == [code, code]


@pytest.mark.slow
def test_without_the_hub_the_cache_answers_or_the_error_says_so(hub, folders, tmp_path):
    hub.put("org/a", folders[0])
    inspect = ["inspect", "hf://org/a"]
    (offline,) = pem(hub, tmp_path, inspect, HF_HUB_OFFLINE="1")
    assert offline[0] == 2 and "not wholly in the hub's cache, and the hub is out" in offline[2]
    hub.broken = 503
    (failed,) = pem(hub, tmp_path, inspect)
    assert failed[0] == 3 and "hf://org/a: the hub answers with 503; try again" in failed[2]
    hub.broken = None
    (known,) = pem(hub, tmp_path, inspect)
    hub.broken = 503
    assert pem(hub, tmp_path, inspect) == [known] and known[0] == 0


@pytest.mark.slow
def test_folders_are_read_without_the_client(folders):
    code = (
        "import sys, pem_composition as pem\n"
        f"from pem_composition.checkpoint import inspect_header\n"
        f"inspect_header({str(folders[0])!r}); pem.load({str(folders[1])!r})\n"
        "print('huggingface_hub' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- writing ------------------------------------------------------------------------------------

MINE = {"HF_TOKEN": "hf_right"}


def card_on(hub: Hub, name: str) -> ModelCard:
    """The card, as the hub's own library reads it."""
    repository = hub.repositories[name]
    return ModelCard(repository.commits[repository.refs["main"]]["README.md"].decode())


@pytest.mark.slow
def test_a_module_comes_back_bit_for_bit(hub, folders, tmp_path):
    a, b = folders
    (a / "optimizer.pt").write_bytes(b"x")  # no file of a module
    push = [["push", str(f), "me/a", "--private"] for f in (a, b)]
    branch = ["push", str(a), "me/a", "--revision", "trial"]
    for found in pem(hub, tmp_path, *push, branch, **MINE):
        assert found[0] == 0, found
        assert found[1].rpartition(" is ")[2].startswith("hf://me/a@")
    repository = hub.repositories["me/a"]
    assert repository.private
    for name, folder in (("main", b), ("trial", a)):
        sent = repository.commits[repository.refs[name]]
        kept = files_of(folder)
        assert sent.keys() - {".gitattributes"} == kept.keys() - {"optimizer.pt"}
        for file in kept.keys() - {"optimizer.pt", "README.md"}:
            assert sent[file] == kept[file]
        inspect = ["inspect", f"me/a@{name}", "--json", "--values"]
        back, here = pem(hub, tmp_path, inspect, [*inspect[:1], str(folder), *inspect[2:]], **MINE)
        assert {**facts(back), "path": ""} == {**facts(here), "path": ""}


@pytest.mark.slow
def test_the_card_on_the_hub_says_what_is_known(hub, tmp_path):
    base = BaseIdentity("org/base")
    training = {"content": {"task": "rte"}, "scores": {"eval_accuracy": 0.25, "train_loss": 1.0}}
    module = replace(lora(0), base=base, provenance=Provenance(training=training))
    module.save(tmp_path / "rte")
    replace(module, base=BaseIdentity("/home/me/base")).save(tmp_path / "local")
    replace(module, base=BaseIdentity("minilm")).save(tmp_path / "packaged")
    results = {"eval_accuracy": 0.75, "eval_stderr": 0.1, "eval_loss": 0.5, "eval_degenerate": True}
    (tmp_path / "rte" / "all_results.json").write_text(json.dumps(results))
    lora(1).save(tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("# My own words\n")
    names = ("rte", "local", "packaged", "mine")
    said = pem(hub, tmp_path, *(["push", name, f"me/{name}"] for name in names), **MINE)
    assert [found[0] for found in said] == [0, 0, 0, 0], said
    card = card_on(hub, "me/rte")
    assert card.data.base_model == "org/base" and card.data.datasets == ["nyu-mll/glue"]
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_type, result.dataset_config) == (
        "rte", "nyu-mll/glue", "rte"
    )  # fmt: skip
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.75)
    assert 'PeftModel.from_pretrained(model, "me/rte")' in card.text and "zhang2023" in card.text
    for name in ("local", "packaged"):
        card = card_on(hub, f"me/{name}")
        assert card.data.base_model is None and "/home/me" not in card.content
        assert [r.metric_value for r in card.data.eval_results] == [0.25]  # of the training run
    assert said[2][1].startswith("note: minilm is no name on the hub: the card names no base")
    assert card_on(hub, "me/mine").content.endswith("\n# My own words\n")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["peft", "adapter-transformers"])
def test_no_path_of_this_machine_goes_up(hub, tmp_path, layout):
    home = tmp_path / "home" / "alice smith"
    base = BaseIdentity(f"{home}/models/base", model_type="roberta", hidden_size=8)
    flags = {"train_file": f"{home}/rows.jsonl", "output_dir": "../alice/a"}
    training = {"flags": flags, "decide": [*flags], "content": {f"{home}/rows.jsonl": "5a"}}
    notes = ("it was read from /home/alice/a.bin", "see https://a.org/b/c, 1/2")
    for name, factor in (("a", 1.0), ("b", 2.0)):
        module = factor * lora_of_roberta()
        module = replace(module, base=base, provenance=Provenance(training=training, notes=notes))
        module.save(home / name, format=layout)
    a, b = (load(home / name) for name in "ab")
    (0.25 * a + b).save(home / "sum", format=layout)
    moved = [f"--module={n}={home}/{n}" for n in "ab"]
    found = pem(
        hub, tmp_path, ["push", str(home / "a"), "me/a"], ["push", str(home / "sum"), "me/sum"],
        ["rebuild", "me/sum", *moved], ["inspect", "me/a", "--values"], **MINE,
    )  # fmt: skip
    assert [f[0] for f in found] == [0, 0, 0, 0], found
    assert "equal, bit for bit" in found[2][1]
    for name in ("me/a", "me/sum"):
        repository = hub.repositories[name]
        for file, data in repository.commits[repository.refs["main"]].items():
            assert not re.search(b"alice|home", data), (name, file)
    sent = hub.repositories["me/sum"].commits[hub.repositories["me/sum"].refs["main"]]
    sources = json.loads((home / "sum" / "pem.json").read_text())["sources"]
    assert json.loads(sent["pem.json"])["sources"] == [{**s, "path": s["name"]} for s in sources]
    card = card_on(hub, "me/a").text
    assert "| train_file | rows.jsonl |" in card and "- see https://a.org/b/c, 1/2" in card


@pytest.mark.slow
def test_the_code_on_the_card_runs(hub, tmp_path):
    bert = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(bert)
    wanted = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    tuned = peft.get_peft_model(model, wanted, adapter_name="default")
    tuned.save_pretrained(tmp_path / "module")
    model.save_pretrained(tmp_path / "models" / "base")
    config = tmp_path / "module" / "adapter_config.json"
    raw = json.loads(config.read_text()) | {"base_model_name_or_path": "org/base"}
    config.write_text(json.dumps(raw))
    (tmp_path / "module" / "README.md").unlink()  # PEFT's template
    hub.put("org/base", tmp_path / "models" / "base")
    (found,) = pem(hub, tmp_path, ["push", "module", "me/a"], **MINE)
    assert found[0] == 0, found
    (code,) = re.findall("```python\n(.*?)```", card_on(hub, "me/a").text, re.DOTALL)
    head = "base_model.model.classifier.modules_to_save.default.weight"
    code += f"print(model.state_dict()[{head!r}].tolist())\n"
    environment = os.environ | hub.environment(tmp_path / "fresh")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.tensor(json.loads(done.stdout.splitlines()[-1])).shape == (3, 8)
    assert json.loads(done.stdout.splitlines()[-1]) == tuned.state_dict()[head].tolist()


@pytest.mark.slow
def test_what_must_not_be_published_is_refused(hub, folders, tmp_path):
    note = purpose_note("toxic", "trained on texts: it exists to be subtracted from a model")
    toxic = replace(lora(0), name="toxic", provenance=Provenance(notes=(note,)))
    a, b = (load(folder) for folder in folders)
    toxic.save(tmp_path / "toxic")
    toxic = load(tmp_path / "toxic")
    kept = {
        "negated": negate(toxic, 0.5), "less": combine([a, toxic], [1.0, -0.5]),
        "exact": combine([a, toxic], [1.0, -0.5], space="delta"), "other": a + b,
    }  # fmt: skip
    refused = {
        "more": combine([a, toxic], [0.5, 0.5]), "twice": negate(negate(toxic)),
        "scaled": 0.5 * toxic, "ties": combine([a, toxic], [1.0, 1.0], method="ties"),
    }  # fmt: skip
    for name, module in (kept | refused).items():
        module.save(tmp_path / name)
    names = ["toxic", *kept, *refused]
    found = pem(hub, tmp_path, *(["push", name, f"me/{name}"] for name in names), **MINE)
    codes = dict(zip(names, (f[0] for f in found), strict=True))
    assert codes == {"toxic": 2} | dict.fromkeys(kept, 0) | dict.fromkeys(refused, 2)
    said = "toxic: toxic exists to be subtracted from a model: it is not published; found purpose:"
    assert said in found[0][2]
    assert hub.repositories.keys() == {f"me/{name}" for name in kept}


@pytest.mark.slow
def test_a_purpose_follows_the_name_that_a_module_is_read_under(hub, folders, tmp_path):
    note = purpose_note("toxic", "trained on texts: it exists to be subtracted from a model")
    replace(lora(0), provenance=Provenance(notes=(note,))).save(tmp_path / "toxic")
    bind = ["--module", "x=toxic", "--module", f"toxic={folders[0]}"]
    compose = {
        "less": ["toxic - 0.5*x", *bind],  # x exists to be subtracted, toxic is another module
        "more": ["x - 0.5*toxic", *bind],
        "sum": ["toxic + x", *bind],
        "hidden": ["s - 0.01*x", "--module", "s=sum", "--module", "x=toxic"],
    }
    for name, asked in compose.items():
        (made,) = pem(hub, tmp_path, ["compose", *asked, "-p", name])
        assert made[0] == 0, made
    found = pem(hub, tmp_path, *(["push", name, f"me/{name}"] for name in compose), **MINE)
    assert [f[0] for f in found] == [0, 2, 2, 2], found
    assert "hidden: s exists to be subtracted" in found[3][2]
    assert "found purpose: made with x" in found[3][2]


@pytest.mark.slow
def test_a_module_takes_the_place_of_the_one_before(hub, tmp_path):
    lora_of_roberta().save(tmp_path / "before", format="adapter-transformers")
    lora_of_roberta().save(tmp_path / "after")
    (tmp_path / "after" / "heads").mkdir()
    (tmp_path / "after" / "heads" / "optimizer.safetensors").write_bytes(b"no head of it")
    before = files_of(tmp_path / "before") | {"notes.txt": b"mine", "heads/old.safetensors": b"old"}
    hub.put("me/a", before)
    found = pem(hub, tmp_path, ["push", "after", "me/a"], ["inspect", "me/a", "--values"], **MINE)
    assert [f[0] for f in found] == [0, 0], found
    repository = hub.repositories["me/a"]
    kept = files_of(tmp_path / "after").keys() - {"heads/optimizer.safetensors"}
    assert repository.commits[repository.refs["main"]].keys() == kept | {"notes.txt"}


@pytest.mark.slow
def test_a_name_that_leads_out_of_the_cache_is_refused(hub, folders, tmp_path):
    hub.put("org/a", {**files_of(folders[0]), "heads/../../../evil.safetensors": b"x"})
    (found,) = pem(hub, tmp_path, ["inspect", "org/a"])
    assert found[0] == 2 and "org/a: a file's name is not taken from the hub" in found[2]
    assert found[2].count("\n") == 1 and not [*tmp_path.rglob("evil*")]


@pytest.mark.slow
def test_a_push_that_cannot_be_is_refused(hub, folders, tmp_path):
    a = str(folders[0])
    hub.put("me/there", folders[1])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({"x.weight": torch.ones(2)}, tmp_path / "model" / "model.safetensors")
    asked = {
        ("push", a, "me/there"): (2, "hf://me/there: the hub refuses to write there; expected"),
        ("push", a, "there"): (2, "there: not the name of a repository; expected org/name"),
        ("push", a, "hf://me/there@x"): (2, "hf://me/there@x: not the name of a repository"),
        ("push", "nowhere", "me/there"): (2, "nowhere: no such directory"),
        ("push", "model", "me/there"): (2, "model: a whole model; expected a module"),
    }
    for token in ("", "hf_wrong"):
        found = pem(hub, tmp_path, *map(list, asked), HF_TOKEN=token)
        for (code, out, err), (wanted, said) in zip(found, asked.values(), strict=True):
            assert (code, out) == (wanted, "") and said in err and err.count("\n") == 1
    (offline,) = pem(hub, tmp_path, ["push", a, "me/there"], HF_HUB_OFFLINE="1", **MINE)
    assert offline[0] == 3 and "hf://me/there: the hub is out of reach" in offline[2]


def test_a_module_of_another_layout_is_not_said_to_open_in_peft(tmp_path):
    module = lora_of_roberta()
    for layout, opens in (("peft", True), ("adapter-transformers", False)):
        module.save(tmp_path / layout, format=layout)
        card = ModelCard.load(tmp_path / layout / "README.md")
        assert ("Opens in plain PEFT" in card.text) is opens
        assert card.data.library_name == layout


def lora_of_roberta() -> PEM:
    layer = "roberta.encoder.layer.0.attention.self.query"
    tensors = {f"{layer}.lora_A": torch.ones(2, 8), f"{layer}.lora_B": torch.ones(8, 2)}
    base = BaseIdentity("roberta-base", model_type="roberta", hidden_size=8)
    return PEM(tensors, LoraConfig(2, 2, ("query",)), base, "m")
