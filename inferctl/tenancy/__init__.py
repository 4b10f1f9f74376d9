"""Who may use a server, how much, and what it cost: keys, limits, usage events, and the relay that carries them."""
