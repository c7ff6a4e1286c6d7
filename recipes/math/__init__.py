"""Grade-school mathematics: questions with worked solutions, which end in a number."""
