"""What README says stays true: its numbers are those of the result files."""

from benchmarks import readme_table


def test_the_speed_table_is_that_of_the_results():
    readme = (readme_table.ROOT / "README.md").read_text()
    shown = readme.split(readme_table.START)[1].split(readme_table.END)[0]
    assert shown.strip() == readme_table.table().strip()
