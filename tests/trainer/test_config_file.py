"""Options from files and recipes, and which source counts."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.trainer.running import ROOT
from trainer.__main__ import main
from trainer.config_file import read_options, recipes


def dry_run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, ["--dry-run", *arguments], env=env)


def line(result: Result, option: str) -> list[str]:
    assert result.exit_code == 0, result.stderr
    return next(line.split() for line in result.stdout.splitlines() if line.split()[0] == option)


def test_command_line_counts_before_environment_before_file_before_default(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text('lr = 1e-2\nbatch-size = 16\nepochs = 7\nlog_to = ["tensorboard", "wandb"]\n')
    found = dry_run("--config", str(file), "--lr", "0.5", env={"CXRAPID_LR": "0.4", "CXRAPID_EPOCHS": "9"})
    assert line(found, "lr") == ["lr", "0.5", "commandline"]
    assert line(found, "epochs") == ["epochs", "9", "environment"]
    assert line(found, "batch_size") == ["batch_size", "16", "--config", str(file)]
    assert line(found, "log_to") == ["log_to", '"tensorboard,wandb"', "--config", str(file)]
    assert line(found, "patience") == ["patience", "1", "default"]


def test_the_config_of_a_run_is_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"lr": {"value": 0.25, "from": "default"}, "flip": {"value": "both", "from": ""}}))
    found = dry_run("--config", str(file))
    assert line(found, "lr")[1] == "0.25"
    assert line(found, "flip")[1] == '"both"'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch-sise = 8", "sets 'batch_sise', which is no option; the nearest is 'batch_size'"),
        ("dry_run = true", "sets 'dry_run', which is no option"),
        ("lr = -1", "lr: -1.0 is not in the range"),
        ("epochs = 1.5", "epochs: '1.5' is not a valid integer"),
        ('loss = "mse"', "loss: 'mse' is not one of"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "my.toml"
    file.write_text(text)
    found = dry_run("--config", str(file))
    assert found.exit_code == 2
    assert message in found.stderr.replace("\n", " ")
    assert str(file) in found.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("my.toml", "lr == 1", "my.toml is no TOML: "),
        ("my.toml", "lr = 1\nlr = 2", "my.toml is no TOML: "),
        ("my.toml", "\xff", "my.toml is no TOML: 'utf-8' codec"),
        ("my.toml", "a" + ".a" * 50_000 + " = 1", "my.toml has more than 16,384 bytes"),
        ("my.toml", "lr" + ".a" * 8_000 + " = 1", "my.toml, lr is damaged: "),
        ("my.toml", "lr = " + "[" * 5_000, "my.toml is no TOML: it is nested too deeply"),
        ("my.toml", "lr = [[1]]", "my.toml, lr is damaged: "),
        ("my.toml", "lr = 2020-01-01", "my.toml, lr is damaged: "),
        ("config.json", "{", "config.json is damaged: Input data was truncated"),
        ("config.json", "[1]", "config.json is damaged: Expected `object`, got `array`"),
        ("config.json", '{"size": 1e999}', "config.json is damaged: [...]: Number out of range"),
        ("config.json", '{"lr": {"value": {}}}', "config.json, lr is damaged: "),
        ("config.json", '{"lr": ' + "[" * 1_000_000, "config.json is damaged: it is nested too deeply"),
        ("config.json", '{"lr": "' + "1" * 2**20 + '"}', "config.json has more than 1,048,576 bytes"),
    ],
    ids=range(14),
)
def test_a_file_that_is_damaged_is_exit_3_with_file_and_field(tmp_path: Path, name: str, text: str, cause: str) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="latin-1")
    found = dry_run("--config", str(file))
    assert found.exit_code == 3, found.exception
    assert found.stderr.startswith(f"Error: {tmp_path}/{cause}") and found.stderr.count("\n") == 1


def test_a_missing_file_is_refused_naming_the_recipes() -> None:
    found = dry_run("--config", "reprot")
    assert found.exit_code == 2
    assert "reference, report" in found.stderr


@pytest.mark.parametrize("recipe", recipes())
def test_a_recipe_sets_valid_options_and_says_what_it_is(recipe: str) -> None:
    found = dry_run("--config", recipe)
    for option in read_options(recipe):
        assert line(found, option)[-2:] == ["--config", recipe]
    text = (ROOT / "trainer" / "recipes" / f"{recipe}.toml").read_text()
    for part in ("Source ", "Command ", "Time ", "Expect ", f"--config {recipe}"):
        assert part in text.split("\n\narch")[0]


def test_the_report_recipe_is_the_reports() -> None:
    options = read_options("report")
    assert options["optimizer"], options["lr"] == ("adam", "0.0001")
    assert (options["batch_size"], options["patience"], options["flip"]) == ("64", "1", "both")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--warmup", "20"], "leaves nothing of --epochs 20"),
        (["--log-to", "tensorbored"], "tensorboard, wandb, mlflow"),
        (["--batch-size", "many"], "batch-size"),
        (["--batch-size", "auto"], "batch-size"),
    ],
)
def test_values_that_do_not_go_together_are_refused(arguments: list[str], message: str) -> None:
    found = dry_run(*arguments)
    assert found.exit_code == 2
    assert message in found.stderr


def test_a_dry_run_says_what_auto_comes_to() -> None:
    found = dry_run("--device", "cpu", "--freeze", "backbone")
    assert line(found, "compile")[:4] == ["compile", '"auto"', "->", "off"]
    assert line(found, "name")[:4] == ["name", '""', "->", "resnet50-backbone"]
    assert line(found, "weights")[:4] == ["weights", '"auto"', "->", "imagenet"]


@pytest.mark.parametrize(
    ("spelling", "former", "name"),
    [("--clip-grad", "--clip", "clip"), ("--grad-accum-steps", "--accumulate", "accumulate")],
)
def test_a_former_spelling_is_an_alias_that_the_help_leaves_out(
    spelling: str, former: str, name: str, tmp_path: Path
) -> None:
    help_text = CliRunner().invoke(main, ["--help"]).stdout
    assert spelling in help_text
    assert f"{former} " not in help_text
    file = tmp_path / "options.toml"
    file.write_text(f"{spelling[2:]} = 3\n")
    for arguments in ([spelling, "3"], [former, "3"], ["--config", str(file)]):
        assert line(dry_run(*arguments), name)[1] in ("3", "3.0")
