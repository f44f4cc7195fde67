"""Where experts are stored, and how their records reach the code that computes them.

plan says what fits where. pool, tiers, reads and copies hold and move records. cache decides which record is evicted,
prefetch which one is fetched before it is requested, and lookahead does the fetching. experts is what the model calls,
and setup joins all of it for a store. watch counts the routers' choices into router_stats and trace; replay tries other
caches on a trace; forecast says how fast it should be, and figures how fast it was.
"""
