"""Markdown tables and the numbers in their cells."""


def table(header: str, rows: list[list[str]]) -> str:
    """A Markdown table with the numbers on the right."""
    rule = ["---:" if cell.replace(",", "").replace(".", "").isdigit() else "---" for cell in rows[0]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header.split("|"), rule, *rows)) + "\n"


def circumstances(results: dict) -> str:
    """Where, with what and how it was measured."""
    return table(
        "|",
        [
            ["hardware", results["hardware"]],
            ["load at start and end", ", ".join(f"{load:.1f}" for load in results["load"])],
            ["environment", ", ".join(f"{name}={value}" for name, value in results["environment"].items())],
            ["versions", ", ".join(f"{name} {number}" for name, number in results["versions"].items())],
            ["seed", str(results["setting"]["seed"])],
            ["command", f"`{results['command']}`"],
        ],
    )


def spread(quartiles: dict[str, float]) -> str:
    """Median (lower to upper quartile)."""
    return "{median:.3f} ({lower:.3f} to {upper:.3f})".format(**quartiles)


def percent(budget: float | None) -> str:
    """A fraction of all parameters."""
    return "" if budget is None else f"{100 * budget:g} %"


def mib(count: int | None) -> str:
    """Bytes in MiB."""
    return "" if count is None else f"{count / 2**20:,.1f}"
