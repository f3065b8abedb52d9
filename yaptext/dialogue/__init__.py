"""Sessions and turns: what an utterance means before an engine sees it."""
