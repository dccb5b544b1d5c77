"""A swarm in virtual time: the client's own code over simulated servers, links and a directory, the same for a seed."""
