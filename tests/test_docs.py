import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_of_models_is_that_of_the_presets():
    spec = importlib.util.spec_from_file_location("model_table", ROOT / "scripts" / "model_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(check=True) == 0, "docs/models.md is out of date: python scripts/model_table.py"


def test_links_between_documents_lead_somewhere():
    import re

    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text("utf-8")):
            assert (document.parent / target).exists(), f"{document.name} points to {target}"


def test_the_tables_of_the_evaluation_are_those_of_its_results():
    from benchmarks import evaluation_tables

    assert evaluation_tables.main(check=True) == 0, "docs/evaluation.md is out of date: python -m benchmarks.evaluation_tables"


def test_the_table_of_training_choices_is_that_of_its_results():
    from benchmarks import controlled_comparison as comparison
    from benchmarks.record import load

    text = comparison.PAGE.read_text(encoding="utf-8")
    found = load("controlled_comparison")
    assert len(found["variants"]) >= 9
    assert comparison.page(text, found) == text, "docs/training-choices.md is out of date: python -m benchmarks.controlled_comparison --page"
