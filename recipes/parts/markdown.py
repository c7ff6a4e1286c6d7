"""Markdown tables and the numbers in their cells."""


def table(header: str, rows: list[list[str]]) -> str:
    """Return a Markdown table with numbers aligned right."""
    rule = ["---:" if cell.replace(",", "").replace(".", "").isdigit() else "---" for cell in rows[0]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header.split("|"), rule, *rows)) + "\n"


def provenance_rows(results: dict) -> list[list[str]]:
    """Return rows of hardware, versions, seed and command."""
    return [
        ["hardware", results["hardware"]],
        ["versions", ", ".join(f"{name} {number}" for name, number in results["versions"].items())],
        ["seed", str(results["seed"])],
        ["command", f"`{results['command']}`"],
    ]


def circumstances(results: dict) -> str:
    """Return the table of hardware, load, environment, versions, seed and command."""
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
    """Format quartiles as median (lower to upper)."""
    return "{median:.3f} ({lower:.3f} to {upper:.3f})".format(**quartiles)


def percent(budget: float | None) -> str:
    """Format a fraction of all parameters in percent."""
    return "" if budget is None else f"{100 * budget:g} %"


def mib(count: int | None) -> str:
    """Format bytes in MiB."""
    return "" if count is None else f"{count / 2**20:,.1f}"


def gib(count: int) -> str:
    """Format bytes in GiB."""
    return f"{count / 2**30:.2f}"
