"""What logged runs say: a summary of each, two beside each other, as text or as one JSON document."""

from attnprobe.run_summary.comparison import Comparison, compare
from attnprobe.run_summary.comparison_document import comparison_document
from attnprobe.run_summary.comparison_text import comparison_text
from attnprobe.run_summary.report_document import report_document
from attnprobe.run_summary.text import summarize

__all__ = ["Comparison", "compare", "comparison_document", "comparison_text", "report_document", "summarize"]
