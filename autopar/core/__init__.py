"""Words shared by every layer; nothing here imports torch.

errors    what users are told
spec      how one tensor lies on a mesh
mesh      the logical grid of devices
cluster   the physical devices and links, and what collectives cost on them
reshard   changes of spec, step by step
sharding  the numbers a sharding problem is made of
plan      everything decided
"""
