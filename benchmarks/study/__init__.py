"""The paper's study on any model and text: tables, ablations, splits, caches and figures. See docs/study.md for the commands."""
