"""What to run where there is a GPU: python -m tests.gpu [REPORT.md]."""
