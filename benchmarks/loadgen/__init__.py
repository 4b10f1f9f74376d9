"""The parts of the load generator. They run in Locust's process, under gevent; inferctl itself imports none of them."""
