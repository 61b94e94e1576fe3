"""`sandbox bench`: what a call costs here, beside what others cost on the same machine in the same minutes.

Every round gives each contender one turn with each job, in changing order, so that whatever else the machine does meets
all of them alike. Numbers of two runs are not to be compared; ratios within one are.
"""
