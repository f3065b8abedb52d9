"""Sessions with their turns: what an utterance means before an engine sees it."""
