from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from hone.recipe import GoalSection
from hone.report.schema import Report

SAMPLE = Path(__file__).parents[1] / "report" / "sample.json"


@pytest.fixture
def slower(tmp_path) -> Path:
    data = json.loads(SAMPLE.read_text(encoding="utf-8"))
    data["steps"][4]["latency_ms"] |= {"median": 0.5, "ci95": [0.49, 0.51]}
    data["threads"] = 4
    path = tmp_path / "slower.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


class TestReport:
    def test_shows_the_table_with_and_without_the_verb(self, run):
        shown = run("report", SAMPLE)
        assert shown == run("report", "show", SAMPLE)
        assert shown.code == 0
        assert "reverted: 4% slower" in shown.out
        assert shown.err == (
            "tuning records for 5 of 6 kernels\nnote: openvino ran in its own process\n"
        )

    @pytest.mark.parametrize(
        ("form", "start"),
        [
            ("--html", "<!doctype html>"),
            ("--md", "| step |"),
            ("--junit", "<?xml"),
            ("--json", '{\n  "schema": "hone.report/1"'),
        ],
    )
    def test_converts_to_stdout_and_to_a_file(self, run, tmp_path, form, start):
        shown = run("report", SAMPLE, form)
        assert (shown.code, shown.err) == (0, "")
        assert shown.out.startswith(start)
        out = tmp_path / "out"
        written = run("report", SAMPLE, form, "-o", out)
        assert (written.code, written.out, written.err) == (0, "", f"wrote {out}\n")
        assert out.read_text(encoding="utf-8") == shown.out

    def test_missing_file_exits_2(self, run, tmp_path):
        shown = run("report", tmp_path / "no.json")
        assert (shown.code, shown.out) == (2, "")
        assert shown.err.startswith(f"error: {tmp_path}/no.json: a report is required")

    def test_says_so_when_the_file_cannot_be_written(self, run, tmp_path):
        shown = run("report", SAMPLE, "--md", "-o", tmp_path / "no" / "x.md")
        assert shown.code == 2
        assert shown.err == f"error: {tmp_path}/no/x.md: cannot write: No such file or directory\n"


class TestDiff:
    def test_same_report_passes_the_gate(self, run):
        shown = run("report", "diff", SAMPLE, SAMPLE, "--fail-slower", "0%")
        assert (shown.code, shown.err) == (0, "")

    def test_gate_exits_5_and_names_the_rows(self, run, slower):
        shown = run("report", "diff", SAMPLE, slower, "--fail-slower", "3%")
        assert shown.code == 5
        assert shown.err == (
            "warning: threads differs: 2 and 4\n"
            f"error: {slower}: at most 3% slower is allowed, measured outside noise: "
            "int8 +25.0%, final package +25.0%\n"
        )
        assert "+25.0%" in shown.out

    def test_shows_without_a_gate(self, run, slower):
        assert run("report", "diff", SAMPLE, slower).code == 0

    def test_json_is_one_document(self, run, slower):
        shown = run("report", "diff", SAMPLE, slower, "--json", "--fail-slower", "30%")
        assert shown.code == 0
        assert shown.data["rows"][-1]["slowdown"] == pytest.approx(0.25)


class TestBuild:
    RECIPE = '[model]\npath = "net.onnx"\n[target]\nthreads = 1\n[goal]\ngoal = "size"\n'

    @pytest.fixture
    def recipes(self, replace_module, tmp_path):
        seen = []

        def build(recipe, *, progress):
            seen.append(recipe)
            with progress.task("baseline"):
                pass
            return Report.read(SAMPLE)

        replace_module("improve", build=build)
        (tmp_path / "hone.toml").write_text(self.RECIPE, encoding="utf-8")
        return seen

    def test_prints_the_table_and_progress_apart(self, run, recipes, tmp_path):
        shown = run("build", tmp_path / "hone.toml")
        assert shown.code == 0
        assert shown.out.startswith("step")
        assert "baseline: done after" in shown.err
        assert recipes[0].target.threads == 1

    def test_json_is_the_report(self, run, recipes, tmp_path):
        shown = run("build", tmp_path / "hone.toml", "--json")
        assert shown.data == json.loads(Report.read(SAMPLE).to_json())

    def test_takes_hone_toml_of_the_current_folder(self, run, recipes, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert run("build").code == 0

    def test_flag_wins_over_environment_over_recipe(self, run, recipes, tmp_path, monkeypatch):
        recipe = tmp_path / "hone.toml"
        monkeypatch.setenv("HONE_THREADS", "2")
        monkeypatch.setenv("HONE_GOAL", "latency")
        run("build", recipe)
        run("build", recipe, "--threads", "3", "--goal", "size")
        assert [r.target.threads for r in recipes] == [2, 3]
        assert [r.goal.goal for r in recipes] == ["latency", "size"]

    @pytest.mark.parametrize("goal", get_args(GoalSection.model_fields["goal"].annotation))
    def test_every_goal_of_a_recipe_is_a_flag(self, goal, run, recipes, tmp_path):
        assert run("build", tmp_path / "hone.toml", "--goal", goal).code == 0
        assert [recipe.goal.goal for recipe in recipes] == [goal]

    def test_every_flag_reaches_the_recipe(self, run, recipes, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        flags = [
            "-o", "out", "--target", "rpi4", "--max-accuracy-drop", "2%", "--tune", "2m",
            "--database", "records", "--seed", "7",
        ]  # fmt: skip
        assert run("build", "hone.toml", *flags).code == 0
        (recipe,) = recipes
        assert recipe.output_directory == tmp_path / "out"
        assert recipe.database_path == tmp_path / "records"
        assert recipe.target.name == "rpi4"
        assert recipe.goal.max_accuracy_drop == pytest.approx(0.02)
        assert (recipe.tune.seconds, recipe.seed) == (120, 7)

    def test_wrong_recipe_exits_2_with_all_problems(self, run, recipes, tmp_path):
        (tmp_path / "hone.toml").write_text('[model]\npat = "x"\nsize = 3\n', encoding="utf-8")
        shown = run("build", tmp_path / "hone.toml")
        assert (shown.code, shown.out) == (2, "")
        assert shown.err == (
            f"error: {tmp_path}/hone.toml: 3 problems in the recipe\n"
            "  - model.path: required, but not given\n"
            "  - model.pat: unknown key, the nearest is 'path'\n"
            "  - model.size: unknown key, known are path, shapes\n"
        )
