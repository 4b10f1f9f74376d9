"""The load generator. It runs in Locust's process, under gevent; inferctl does not import it."""
