"""One command as many processes, which `torchrun` starts: who they are, what they say and what they add up."""
