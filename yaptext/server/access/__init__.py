"""Who may come in: keys, tickets, limits of those that come too often."""
