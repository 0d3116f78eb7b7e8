"""The built-in text, used when none is given: prose, a dialogue, a table and code, written for this."""

PASSAGE = '''\
The ferry had not run for two days, and by the third morning nobody on the quay pretended to be waiting for it. They
stood about with their hands in their pockets and talked of the wind, which had gone round to the north-west and
stayed there. Old Marten, who sold rope and lamp oil from a shed behind the customs house, said that in his father's
time it had blown like this for eleven days, and that on the twelfth a barrel of herring had come in at the harbour
mouth by itself, upright, as if somebody had sent it. Nobody believed him. Still, several people looked at the water.

At noon the schoolteacher came down with a telescope under her arm. She set it on the wall, bent over it for a long
time, and then wrote a number into a small green book. "Forty-one," she said, to no one in particular. "Yesterday it
was thirty-eight." When the boy from the bakery asked her what she was counting, she told him that she counted the
seconds between the breaking of a wave on the outer reef and its arrival at the steps. From that, she said, and from
the depth that is printed on the chart, you may find how long the wave is, and from how long it is you may guess how
far away it was made. The boy thought about it. "And where was it made?" he asked. She shut the book. "A good deal
further off than we can do anything about," she said.

"You always say that."
"It is always true."
"But if you knew it yesterday, why did you not tell us yesterday?"
"Because yesterday I had one number, and with one number you can only be wrong."

How a tide table is made. The moon passes over a place once in about 24 hours and 50 minutes, and pulls the sea
towards it; on the far side of the earth the sea is pulled least, and stands up too. So there are two high tides in
that time, one every 12 hours and 25 minutes. The sun does the same with a little less than half the force. When both
pull along one line, at new and at full moon, the range is largest (springs); when they pull at right angles it is
smallest (neaps). The shape of the coast does the rest: in a narrowing bay the same water has to climb, and a range of
one metre in the open ocean becomes twelve at the head of the bay. Nobody computes this from first principles for a
harbour. One measures the level for a year, fits some thirty waves of known periods to it, and adds them up for the
years to come.

    day    high     m      low      m
    Mon    03:12    4.1    09:25    1.3
    Tue    03:58    4.4    10:11    1.0
    Wed    04:41    4.6    10:55    0.8
    Thu    05:24    4.7    11:38    0.7
    Fri    06:07    4.6    12:21    0.8

def next_high(levels, period=745):
    """The minute of the next high water after the last level; levels are one a minute."""
    best, at = float("-inf"), 0
    for minute, level in enumerate(levels[-period:]):
        if level > best:
            best, at = level, minute
    return at + period - len(levels[-period:])

for harbour in ("Skagen", "Ribe", "Esbjerg"):
    levels = read_levels(harbour)
    if not levels:
        print(f"{harbour}: no levels, is the gauge frozen?")
        continue
    print(f"{harbour}: {next_high(levels) // 60:02d}:{next_high(levels) % 60:02d}")

Q: A boat needs 2.5 metres of water and the harbour is 1.2 metres deep at chart datum. How much tide does it need?
A: 2.5 - 1.2 = 1.3 metres. On Monday it can leave at any hour, on Thursday it waits near low water.

In the evening the wind fell. There was no moment at which it did so; somebody noticed that he had stopped shouting,
and then they all did. The flag on the customs house hung down for the first time in a week, and was seen to have lost
its lower half. Marten lit the lamp, though it was not dark. Towards nine a light showed beyond the reef, went out,
and showed again a little further to the left, and the boy, who had been told to go to bed twice, counted under his
breath until the next wave reached the steps. It took fifty-two seconds. He ran to tell the schoolteacher, but she had
gone home; so he wrote it on the wall with chalk, 52, and under it, after some thought, the day and his name.'''
