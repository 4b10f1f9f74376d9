"""What the servers of a fleet share: keys in a database, and NATS. Servers have no part of it; relays do."""
