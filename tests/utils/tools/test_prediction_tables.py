"""The text that utils.predict prints; its files are tested in test_predict.py."""

from utils.tools.prediction_tables import Prediction, format_table


def test_files_are_printed_in_full_and_aligned() -> None:
    path = f"/{'folder/' * 8}a.jpg"
    table = format_table([Prediction("b.jpg", ["cat, kitty", "dog"], [0.75, 0.25]), Prediction(path, ["dog"], [1.0])])
    assert table == f"{'b.jpg':40}  cat 75.0%  dog 25.0%\n{path}  dog 100.0%"
