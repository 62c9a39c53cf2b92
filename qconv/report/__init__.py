"""For people: terminal, HTML, charts."""
