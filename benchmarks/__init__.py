"""Measurements that take too long for the test suite, each one command, with their recorded results in README.md."""
