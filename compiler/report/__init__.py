"""Reports: JSON, HTML, Markdown, JUnit."""
