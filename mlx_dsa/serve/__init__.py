"""An OpenAI-compatible server of many conversations at once, with a page."""
