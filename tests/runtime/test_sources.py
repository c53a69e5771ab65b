"""Where settings come from: precedence, strict values, misspelt names, .env files, flags of other commands."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hostile_settings import TABLES
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.errors import UsageError
from runtime.settings.config import CommonSettings, Settings, from_command_line
from runtime.settings.fields import setting as field
from runtime.settings.fields import settings_of
from runtime.settings.sources import describe, read_settings
from runtime.settings.spelling import CALLED, near_miss, typing_errors

ROWS = settings_of(Settings)
NOWHERE = Path("no such folder") / ".env"


def read(*argv, environ=None, dotenv=NOWHERE, cls=Settings, also=()):
    return read_settings(cls, argv, environ or {}, dotenv, prog="training.py", description="Train.", also=also)


def refused(*argv, **sources) -> str:
    with pytest.raises(UsageError) as caught:
        read(*argv, **sources)
    message = str(caught.value)
    assert message.isprintable() and caught.value.status == 2, "one line, exit status 2"
    return message


@pytest.fixture
def dotenv(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / ".env"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@dataclass(frozen=True, kw_only=True)
class Sampling(CommonSettings):
    """A command's own flags on top of the shared settings, as generate.py has them."""

    prompt: tuple[str, ...] = field((), "Text to continue; may be repeated", group="Text", env=False)
    max_new_tokens: int = field(200, "Tokens to write", group="Text", low=1, env=False)
    top_k: int | None = field(None, "Draw from the likeliest only", group="Text", low=1, env=False)


# --- precedence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "environ", "file", "rank", "source"),
    [
        ((), {}, "", Settings().lora_rank, None),
        ((), {}, "LORA_RANK=2", 2, ".env"),
        ((), {"LORA_RANK": "3"}, "LORA_RANK=2", 3, "environment"),
        (("--lora-rank", "4"), {"LORA_RANK": "3"}, "LORA_RANK=2", 4, "flag --lora-rank"),
        (("--lora-rank=4",), {"LORA_RANK": "3"}, "", 4, "flag --lora-rank"),
        (("--lora_rank=4",), {}, "", 4, "flag --lora-rank"),
        (("--lora-rank", "4", "--lora-rank", "5"), {}, "", 5, "flag --lora-rank"),
    ],
)
def test_flag_then_environment_then_dotenv_then_default(argv, environ, file, rank, source, dotenv):
    resolved = read(*argv, environ=environ, dotenv=dotenv(file))
    assert resolved.settings.lora_rank == rank
    assert resolved.sources == ({"LORA_RANK": source} if source else {})
    assert resolved.explicit("lora_rank") == resolved.explicit("LORA_RANK") == bool(source)
    assert describe(resolved) == ([f"LORA_RANK={rank} ({source})"] if source else [])


def test_the_command_line_the_environment_and_the_current_folder_are_what_is_read(dotenv, monkeypatch):
    monkeypatch.chdir(dotenv("LORA_ALPHA=32").parent)
    monkeypatch.setenv("LORA_RANK", "4")
    monkeypatch.setattr(sys, "argv", ["training.py", "--use-lora"])
    found = from_command_line(Settings, "Train.").settings
    assert (found.use_lora, found.lora_rank, found.lora_alpha) == (True, 4, 32.0)


# --- values ---------------------------------------------------------------------------------------------------------

TRUE = ["true", "True", "TRUE", "1", "yes", "YES", "on", "On"]
FALSE = ["false", "False", "0", "no", "off", "OFF"]


@pytest.mark.parametrize(("text", "value"), [(text, True) for text in TRUE] + [(text, False) for text in FALSE])
def test_booleans_in_every_form(text, value, dotenv):
    assert read(environ={"USE_LORA": text}).settings.use_lora is value
    assert read(dotenv=dotenv(f"USE_LORA={text}")).settings.use_lora is value
    assert read(f"--use-lora={text}").settings.use_lora is value
    assert read("--use-lora", text, "--test-mode").settings.use_lora is value


def test_boolean_flags_without_a_value():
    assert read("--use-lora").settings.use_lora is True
    assert read("--no-use-lora", environ={"USE_LORA": "1"}).settings.use_lora is False
    assert read("--use-lora", "--seed", "7").settings.seed == 7
    assert "--no-use-lora" in refused("--no-use-lora=1")


@pytest.mark.parametrize("text", ["", "t", "y", "2", "-1", "none", "tru", "enable", "０"])
def test_nothing_else_is_a_boolean(text):
    assert refused(environ={"USE_LORA": text}) == (
        f"USE_LORA={text} (from the environment): must be true or false (also yes, no, on, off, 1, 0)"
    )


def test_a_bad_value_is_one_line_with_all_there_is_to_know(dotenv):
    rule = "must be a whole number from 1 to 4096"
    assert refused(environ={"LORA_RANK": "0"}) == f"LORA_RANK=0 (from the environment): {rule}"
    assert refused(dotenv=dotenv("LORA_RANK=x")) == f"LORA_RANK=x (from .env): {rule}"
    assert refused("--lora-rank", "0") == f"--lora-rank 0 (flag): {rule}"
    assert refused("--lora-rank=") == f"--lora-rank '' (flag): {rule}"
    assert refused("--lora-rank") == "--lora-rank: expected one argument; --help lists all flags"
    assert "expected one argument" in refused("--lora-rank", "--use-lora")


@pytest.mark.parametrize(
    "text", ["8.0", "1_000", "1e3", "0x8", "８", "٨", "", " ", "+", "--8", "8 8", "9" * 19, "9" * 6000]
)
def test_whole_numbers_are_strict(text):
    assert "a whole number from 1 to 1000000000" in refused(environ={"MAX_ITERS": text})


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "Infinity", "1e999", "0x1p3", "1_0", "", ".", "1,5", "١"])
def test_numbers_are_strict_and_finite(text):
    assert "a number of at least 0" in refused(environ={"GRAD_CLIP": text})


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("1", 1.0), (".5", 0.5), ("2.", 2.0), ("+1E1", 10.0)])
def test_numbers_in_their_usual_forms(text, value):
    found = read("--grad-clip", text).settings.grad_clip
    assert found == value and type(found) is float


def test_blanks_around_a_value_are_cut_off_as_cmd_leaves_them():
    found = read(environ={"LORA_RANK": "4 ", "USE_LORA": " True", "BASE": "base-shakespeare "}).settings
    assert (found.lora_rank, found.use_lora, found.base) == (4, True, "base-shakespeare")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@settings(max_examples=12, deadline=None)
@given(text=st.text(max_size=12) | st.integers().map(str) | st.floats().map(str), source=st.sampled_from("fe."))
@example(text="9007199254740993", source="f")  # no float is this number: a message must show what was written
def test_any_value_from_any_source_is_taken_or_refused_in_one_line(row, text, source, tmp_path_factory):
    argv, environ, path = [], {}, NOWHERE
    if source == "f":
        argv = [f"{row.flag}={text}"]
    elif source == "e":
        environ = {row.variable: text}
    else:
        path = tmp_path_factory.getbasetemp() / ".env"
        path.write_bytes(f"{row.variable}={text}\n".encode("utf-8", "surrogatepass"))
    try:
        resolved = read(*argv, environ=environ, dotenv=path)
    except UsageError as error:
        message = str(error)
        assert message.isprintable()
        told = {"f": (row.flag, "(flag)"), "e": (row.variable, "(from the environment)"), ".": (".env",)}[source]
        assert all(part in message for part in told)
        assert source == "." or not text.isprintable() or text.strip() in message
    else:
        assert Settings.from_dict(resolved.settings.as_dict()) == resolved.settings


# --- misspelt names -------------------------------------------------------------------------------------------------

NEAR = {
    "LORA_RNAK": "LORA_RANK",
    "LORA_RNK": "LORA_RANK",
    "LORA_RANKS": "LORA_RANK",
    "LORRA_RNAK": "LORA_RANK",
    "LORA-RANK": "LORA_RANK",
    "LORARANK": "LORA_RANK",
    "lora_rank": "LORA_RANK",
    "Lora_Rank": "LORA_RANK",
    "LORA_ALPHAS": "LORA_ALPHA",
    "LORA_APLHA": "LORA_ALPHA",
    "LORA_DROPUOT": "LORA_DROPOUT",
    "USE_LORRA": "USE_LORA",
    "USE-LORA": "USE_LORA",
    "USE.LORA": "USE_LORA",
    "USELORA": "USE_LORA",
    "use_lora": "USE_LORA",
    "USE_LOAR": "USE_LORA",
    "UES_LORA": "USE_LORA",
    "TEST_MOD": "TEST_MODE",
    "TESTMODE": "TEST_MODE",
    "TEST_MODES": "TEST_MODE",
    "MAX_ITER": "MAX_ITERS",
    "MAXITERS": "MAX_ITERS",
    "N_LAYERS": "N_LAYER",
    "N_HEADS": "N_HEAD",
    "MIN_LRS": "MIN_LR",
    "LEARNIG_RATE": "LEARNING_RATE",
    "LERNING_RAT": "LEARNING_RATE",
    "WARMUP_ITER": "WARMUP_ITERS",
    "BATCHSIZE": "BATCH_SIZE",
    "BATCH_SZIE": "BATCH_SIZE",
    "CHECKPOINT_DIR": "CHECKPOINTS_DIR",
    "GRADIENT_ACUMULATION_STEP": "GRADIENT_ACCUMULATION_STEPS",
    "LORA_TRAINEMBEDDINGS": "LORA_TRAIN_EMBEDDINGS",
}
# fmt: off
STRANGERS = [
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "BASE_URL", "DEVICE_ID", "DEVICES", "SEEDS", "BASES", "LS_COLORS",
    "LORAX_TOKEN", "LORA", "TERM", "TESTS", "TEST", "TEST_DB", "USE_LOCAL", "USE_CORS", "USE_CUDA",
    "USE_LOG", "META_DIR", "DATA_ID", "DATA_DIR_URL", "BIN_NAME", "RG_NAME", "USERNAME", "HOSTNAME", "USER_NAME",
    "JOB_NAME", "BATCH", "RUN", "WORLD_SIZE", "LOCAL_RANK", "MODEL_SIZE", "BUFFER_SIZE", "PAGE_SIZE",
    "MAX_ITERATIONS_ALLOWED", "N_JOBS", "N_CPU", "MAX_JOBS", "EVAL", "LEARNING", "RATE", "OMP_NUM_THREADS",
    "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "XDG_DATA_DIRS", "PYTHONPATH", "PS1", "ProgramFiles(x86)",
    "CommonProgramFiles", "http_proxy", "npm_config_cache", "SSH_AUTH_SOCK", "GIT_DIR", "PWD", "OLDPWD", "SHLVL",
    "_", "DATA", "TEST_DIR", "seed", "device", "fresh", "BASH_FUNC_which%%", "HF_HOME", "TOKENIZERS_PARALLELISM",
    "WANDB_MODE", "DEBUG_MODE", "SAFE_MODE"
]
# fmt: on


@pytest.mark.parametrize(("name", "meant"), NEAR.items())
def test_near_misses_are_refused_but_for_what_may_be_another_programs(name, meant, dotenv, capsys):
    check_told(name, f"did you mean {meant}?", "LORA" in meant, dotenv, capsys)
    flag = "--" + name.lower().replace("_", "-")
    if flag[2:].replace("-", "_") != meant.lower():  # what differs only in case or separators is right as a flag
        assert f"did you mean --{meant.lower().replace('_', '-')}?" in refused(flag, "1")


def check_told(name, hint, ours, dotenv, capsys):
    """A name that is no setting is an error in .env, and in the environment if it must be ours; else a warning."""
    assert refused(dotenv=dotenv(f"{name}=x")) == f"{name} (in .env) is not a setting; {hint}"
    if ours:
        assert refused(environ={name: "x"}) == f"{name} (in the environment) is not a setting; {hint}"
    else:
        assert read(environ={name: "K", "SEED": "3"}).sources == {"SEED": "environment"}
        warning = f"warning: {name} (in the environment) is not a setting and is ignored; {hint}\n"
        assert capsys.readouterr().err == warning


ALIASES = {
    "LORA_R": "LORA_RANK", "LORA_DROP": "LORA_DROPOUT", "LORA_TARGET_MODULES": "LORA_TARGETS", "LR": "LEARNING_RATE",
    "DATASETS": "DATASET", "target_modules": "LORA_TARGETS", "MAX_STEPS": "MAX_ITERS", "DATASET_NAME": "DATASET",
    "PER_DEVICE_TRAIN_BATCH_SIZE": "BATCH_SIZE", "WARMUP_STEPS": "WARMUP_ITERS", "MODEL_NAME_OR_PATH": "BASE",
    "OUTPUT_DIR": "CHECKPOINTS_DIR", "out_dir": "CHECKPOINTS_DIR", "EVAL_STEPS": "EVAL_INTERVAL",
    "SAVE_STEPS": "SAVE_INTERVAL", "CONTEXT_LENGTH": "BLOCK_SIZE", "MAX_SEQ_LENGTH": "BLOCK_SIZE",
    "GRADIENT_ACCUMULATION": "GRADIENT_ACCUMULATION_STEPS",
}  # fmt: skip


@pytest.mark.parametrize(("name", "meant"), ALIASES.items())
def test_what_other_programs_call_a_setting_is_told_its_name_here(name, meant, dotenv, capsys):
    check_told(name, f"it is called {meant} here", name.startswith("LORA_"), dotenv, capsys)
    assert f"it is called --{meant.lower().replace('_', '-')} here" in refused("--" + name.lower(), "1")


def test_rank_is_torchruns_in_the_environment_and_told_elsewhere(dotenv, capsys):
    assert read(environ={"RANK": "0", "R": "x"}).sources == {} and not capsys.readouterr().err
    for name in ("RANK", "r"):
        assert "it is called LORA_RANK here" in refused(dotenv=dotenv(f"{name}=8"))
        assert "it is called --lora-rank here" in refused(f"--{name.lower()}", "8")


def test_whatever_begins_with_lora_is_ours_and_refused(dotenv):
    for source in ({"environ": {"LORA_TOKEN": "x"}}, {"dotenv": dotenv("LORA_TOKEN=x")}):
        assert refused(**source).endswith("is not a setting; --help lists them all")


def test_every_alias_is_of_a_setting_and_is_none_itself():
    names = {row.variable for table in TABLES.values() for row in settings_of(table)}
    assert set(CALLED.values()) <= names and not {each.variable for row in ROWS for each in row.spellings} & set(CALLED)


@pytest.mark.parametrize(
    ("argv", "environ", "file", "value", "source"),
    [
        ((), {}, "LR_SCHEDULE=cosine", "cosine", ".env"),
        ((), {"LR_SCHEDULE": "constant "}, "LR_DECAY=cosine", "constant", "environment"),
        ((), {"LR_DECAY": "constant"}, "LR_SCHEDULE=cosine", "constant", "environment"),
        (("--lr-schedule", "linear"), {"LR_DECAY": "constant"}, "", "linear", "flag --lr-schedule"),
        (("--lr_schedule=linear",), {"LR_SCHEDULE": "cosine"}, "", "linear", "flag --lr-schedule"),
        (("--lr-decay=linear",), {"LR_SCHEDULE": "cosine"}, "", "linear", "flag --lr-decay"),
    ],
)
def test_the_schedule_has_two_names_that_mean_the_same(argv, environ, file, value, source, dotenv, capsys):
    resolved = read(*argv, environ=environ, dotenv=dotenv(file))
    assert resolved.settings.lr_decay == value
    assert resolved.sources == {"LR_DECAY": source} and resolved.explicit("lr_decay")
    assert describe(resolved) == [f"LR_DECAY={value} ({source})"] and not capsys.readouterr().err


def test_the_other_name_is_told_as_it_was_written_and_misspelt(dotenv):
    must_be = "must be one of cosine, linear, constant"
    assert refused("--lr-schedule", "step") == f"--lr-schedule step (flag): {must_be}"
    assert refused(environ={"LR_SCHEDULE": "step"}) == f"LR_SCHEDULE=step (from the environment): {must_be}"
    assert refused(dotenv=dotenv("LR_SCHEDULE=step")) == f"LR_SCHEDULE=step (from .env): {must_be}"
    assert refused("--lr-shedule", "cosine") == "--lr-shedule is not a flag; did you mean --lr-schedule?"
    assert "did you mean LR_SCHEDULE?" in refused(dotenv=dotenv("LR_SHEDULE=cosine"))


def test_both_names_in_one_place_are_refused(dotenv):
    both = {"LR_DECAY": "linear", "LR_SCHEDULE": "linear"}
    told = "LR_DECAY=linear ({0}) and LR_SCHEDULE=linear ({0}) are the same setting; keep one of them"
    assert refused(environ=both) == told.format("from the environment")
    assert refused(dotenv=dotenv("LR_DECAY=linear\nLR_SCHEDULE=linear")) == told.format("from .env")
    told = "--lr-decay linear (flag) and --lr-schedule cosine (flag) are the same setting; keep one of them"
    assert refused("--lr-decay", "linear", "--lr-schedule", "cosine") == told


def test_strangers_are_left_alone(dotenv, capsys):
    assert read(environ=dict.fromkeys(STRANGERS, "x")).sources == {} and not capsys.readouterr().err
    lines = "\n".join(f"{name}=x" for name in STRANGERS)
    assert read(dotenv=dotenv(lines)).sources == {}


def test_no_setting_is_a_near_miss_of_another():
    names = [row.variable for row in ROWS if row.env]
    environ = {row.variable: str(row.default) for row in ROWS if row.env}
    assert read(environ=environ).sources.keys() == set(names)


@settings(deadline=None)
@given(data=st.data())
def test_any_single_typing_error_in_a_distinctive_name_is_noticed(data):
    name = data.draw(st.sampled_from([row.variable for row in ROWS if row.env and "_" in row.variable]))
    at = data.draw(st.integers(0, len(name) - 2))
    letter = data.draw(st.sampled_from("AEQZ_"))
    for wrong in (
        name[:at] + name[at + 1 :],
        name[:at] + letter + name[at:],
        name[:at] + name[at + 1] + name[at] + name[at + 2 :],
    ):
        assert near_miss(wrong, [name]) == name


@pytest.mark.parametrize(
    ("a", "b", "errors"),
    [
        ("", "", 0),
        ("abc", "abc", 0),
        ("abc", "acb", 1),
        ("abc", "ab", 1),
        ("abc", "abxc", 1),
        ("ca", "abc", 3),
        ("", "xy", 2),
    ],
)
def test_typing_errors(a, b, errors):
    assert typing_errors(a, b) == typing_errors(b, a) == errors


def test_a_large_environment_costs_little():
    environ = {f"SOME_{i}_OTHER_SIZE_{i % 7}": "x" for i in range(500)}
    start = time.perf_counter()
    read(environ=environ)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--lora-rnak", "did you mean --lora-rank?"),
        ("--LORA-RANK=3", "did you mean --lora-rank?"),
        ("-lora-rank", "did you mean --lora-rank?"),
        ("LORA_RANK=16", "did you mean --lora-rank?"),
        ("--sed=3", "did you mean --seed?"),
        ("--no-lora-rank", "is not a flag"),
        ("--use-lor", "did you mean --use-lora?"),  # an abbreviation is not taken either
        ("--zzz", "--help lists them all"),
        ("config.py", "--help lists them all"),
        ("--", "is not a flag"),
        ("", "is not a flag"),
        ("--ba\nd", "is not a flag"),
    ],
)
def test_unknown_words_on_the_command_line(word, told):
    assert told in refused(word)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=8) | st.sampled_from([row.flag for row in ROWS]) | st.just("1"), max_size=5))
def test_any_command_line_is_taken_or_refused_in_one_line(argv):
    try:
        read(*argv)
    except UsageError as error:
        assert str(error).isprintable()


# --- .env -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\n\nLORA_RANK 8\n", "line 3: cannot be read"),
        ("SEED=1\r\nLORA_RANK: 8\r\n", "line 2: cannot be read"),
        ("=8", "line 1: cannot be read"),
        ('A=1\nRUN_NAME="x\n', "line 2: cannot be read"),
        ("# note\nLORA_RANK\n", "line 2: LORA_RANK has no value; write LORA_RANK=value"),
        ("export SEED", "line 1: SEED has no value"),
        ("SEED=1\n\nSEED=2\n", "line 3: SEED was given before"),
        ("SEED=", "SEED= (from .env): must be a whole number"),
        ("SEED=8#no", "SEED=8#no (from .env)"),
        ("DATA_DIR=${HOEM}/data", "line 1: ${HOEM} is not set"),
        ('DATA_DIR="C:\\new\\runs"', "line 1: DATA_DIR has a backslash in double quotes; write the value without"),
        ("SEED=1\n".encode("utf-16-le"), "is not UTF-8 text but looks like UTF-16"),
        ("SEED=1\n".encode("utf-16-be"), "is not UTF-8 text but looks like UTF-16"),
        ("CHECKPOINTS_DIR=$NOWHERE/runs", "line 1: ${NOWHERE} is not set"),
        (b"RUN_NAME=\xff", "is not UTF-8 text (byte 9)"),
        ("SEED=1\n".encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_bad_lines_are_refused(text, told, dotenv):
    assert told in refused(dotenv=dotenv(text))


@pytest.mark.parametrize(
    "text",
    [
        "SEED=5",
        "export SEED=5 # a comment",
        "\ufeffSEED='5'\r\n",
        '# SEED=4\n\n  SEED = "5"\n',
        "OTHER=5\nSEED=${OTHER}",
        "SEED=${NOPE:-5}\nPASSWORD=a${b}c",
    ],
)
def test_good_lines_are_read(text, dotenv):
    assert read(dotenv=dotenv(text)).settings.seed == 5


def test_folders_are_expanded(dotenv, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for argv, environ, file in (
        ((), {"HOME": "/home/me"}, "DATA_DIR=$HOME/x\nCHECKPOINTS_DIR=~/x\nBASE=${HOME}/x\nDATASET='~/x'"),
        ((), dict.fromkeys(("DATA_DIR", "CHECKPOINTS_DIR", "BASE", "DATASET"), "~/x"), ""),
        (("--data-dir=~/x", "--checkpoints-dir", "~/x", "--base=~/x", "--dataset=~/x"), {}, ""),
    ):
        s = read(*argv, environ=environ, dotenv=dotenv(file)).settings
        assert {s.data_dir, s.checkpoints_dir, s.base, s.dataset} == {"/home/me/x"}


def test_a_windows_folder_without_quotes_is_kept_letter_by_letter(dotenv):
    for text in ("C:\\new\\runs", "'C:\\new\\runs'"):
        assert read(dotenv=dotenv(f"DATA_DIR={text}")).settings.data_dir == "C:\\new\\runs"


def test_the_terminals_width_is_no_name_of_columns(dotenv):
    """Shells and CI export it as COLUMNS, and so may a person what the columns of records are called."""
    assert read(environ={"COLUMNS": "80"}).sources == {}
    told = read(environ={"COLUMNS": "output=answer"})
    assert (told.settings.columns, told.sources) == ("output=answer", {"COLUMNS": "environment"})
    assert read(dotenv=dotenv("COLUMNS=output=answer"), environ={"COLUMNS": "80"}).settings.columns == "output=answer"


def test_an_empty_text_setting_is_its_empty_default(dotenv):
    resolved = read(dotenv=dotenv("BASE=\nRUN_NAME=''"))
    assert (resolved.settings.base, resolved.settings.run_name) == ("", "")
    assert resolved.explicit("base")


def test_a_folder_called_dotenv_and_a_missing_file_are_no_settings(tmp_path):
    (tmp_path / ".env").mkdir()
    assert read(dotenv=tmp_path / ".env").sources == {} == read(dotenv=tmp_path / "none").sources


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40) | st.text("SEDA=\"'\\\n\r #${}:-1é", max_size=40).map(str.encode))
def test_any_file_is_taken_or_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.env"
    path.write_bytes(content)
    try:
        read(dotenv=path)
    except UsageError as error:
        assert str(error).isprintable()


# --- a command's own flags ------------------------------------------------------------------------------------------


def test_repeated_and_optional_flags():
    found = read("--prompt", "To be", "--prompt=--x\n", "--top-k", "5", cls=Sampling).settings
    assert (found.prompt, found.top_k, found.max_new_tokens) == (("To be", "--x\n"), 5, 200)
    assert read(cls=Sampling).settings.top_k is None
    assert read("--top-k", "none", cls=Sampling).settings.top_k is None
    assert refused("--top-k", "0", cls=Sampling).endswith("must be a whole number of at least 1 or none")
    assert Sampling.from_dict({"prompt": ["a"]}).prompt == ("a",)


def test_flags_only_settings_ignore_the_environment_and_shared_ones_do_not():
    environ = {"PROMPT": "$P$G", "MAX_NEW_TOKENS": "x", "MAX_NEW_TOKEN": "x", "SEED": "3", "LORA_RANK": "4"}
    resolved = read(environ=environ, cls=Sampling, also=(Settings,))
    assert resolved.sources == {"SEED": "environment"}
    assert "did you mean LORA_RANK?" in refused(environ={"LORA_RNAK": "4"}, cls=Sampling, also=(Settings,))
    assert "is not a flag" in refused("--lora-rank", "4", cls=Sampling, also=(Settings,))


def test_help_of_a_command_shows_its_own_flags_first(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help", cls=Sampling)
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert text.index("--prompt TEXT") < text.index("--top-k N") < text.index("--device")


def test_a_usage_error_ends_a_command_with_status_2(tmp_path):
    code = (
        "from runtime.settings.config import *; from runtime.processes.command import run_command\n"
        "run_command(lambda: from_command_line(Settings, ''))"
    )
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run([sys.executable, "-c", code, "--seed=x"], cwd=root, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "error: --seed x (flag): must be a whole number from 0 to 2147483647\n"
