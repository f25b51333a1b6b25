"""A cluster as it is: what its devices and links do under the backend that will run.

effort    how large, how often and how long to try
crew      all ranks, meeting before and telling each other after each try
fit       medians by bytes as a curve of few knots
pairs     every link by itself, there and back
groups    the collectives of every partition of the ranks that the axes of a mesh can make
tiers     hosts, recognised by their links
uplinks   what all devices of a host send to another at once
devices   matmuls, memory and launches of each device
progress  how far it is, on rank 0's terminal
cluster   all of it, as a Cluster
"""
