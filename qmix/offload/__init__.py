"""Where experts live, and how they get to where they are computed.

plan says what fits where; pool, tiers, reads and copies hold and move records; cache decides what leaves, prefetch
what is fetched before it is asked for, lookahead carries that out; experts is what the model calls, and setup joins
all of it for a store. watch counts what the routers choose into router_stats and trace; replay tries other
caches on a trace; forecast and figures say how fast it should be and was.
"""
