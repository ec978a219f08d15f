"""`foveola pretrain auto`: a plan of a run from its data, machine and budget, with a reason for each line.

`facts` looks at data and machine, `cost` estimates what a configuration needs, `choices` decides, `plan` puts
a plan together and finds the one that a run was begun with. Not here: anything that trains.
"""
