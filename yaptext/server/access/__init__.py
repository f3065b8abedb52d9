"""Who may come in: keys, tickets, and those that come too often."""
