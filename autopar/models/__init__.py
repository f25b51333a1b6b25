"""Models to plan and train by name, and the user's own.

catalog   the names and what each stands for, without torch
built     a model with everything a planner needs
resnet    residual networks, modules named as in torchvision
factory   the user's own, from path/to/file.py:factory
registry  name -> built model
"""
