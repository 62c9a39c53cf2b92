"""Results for people: terminal, HTML pages, charts."""
