"""One self-contained HTML page about a result, and its figures. Needs the extra `report`."""

from .page import write_report

__all__ = ["write_report"]
