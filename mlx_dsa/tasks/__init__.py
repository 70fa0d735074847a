"""What is asked, apart from how it is run: texts, facts, questions and what counts as an answer. No MLX here."""
