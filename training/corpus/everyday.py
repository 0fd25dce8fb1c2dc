"""Generates everyday sentences that are missing in dictionaries: greetings, short answers, questions,
contractions, lists, requests, and sentences with numbers, times, dates and money, up to three clauses long.

`PATTERNS` refer to `WORDS` by name in braces; numbers are drawn for {low-high}.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence

WORDS = {
    name: words.split("|")
    for name, words in {
        "name": "Anna|Ben|Carla|David|Emma|Frank|Grace|Henry|Ivy|Jack|Kate|Leo|Maria|Nora|Oscar|Paul|Rosa|"
        "Sam|Tina|Victor|Alice|Bob|Chloe|Daniel|Ella|Fred|Hannah|James|Julia|Kevin|Laura|Lily|Mark|"
        "Michael|Olivia|Peter|Rachel|Robert|Sarah|Simon|Sophie|Thomas|Tom|William|Zoe",
        "title": "Mister|Doctor|Professor|Captain",
        "surname": "Adams|Baker|Brown|Carter|Clark|Cooper|Davis|Evans|Fisher|Green|Harris|Hill|Jackson|"
        "Johnson|King|Lewis|Miller|Moore|Parker|Roberts|Smith|Taylor|Turner|Walker|White|Wilson|"
        "Young",
        "city": "London|Paris|Rome|Berlin|Madrid|Oslo|Boston|Chicago|Sydney|Toronto|Dublin|Vienna|Lisbon|"
        "Tokyo|Athens|Brussels|Copenhagen|Denver|Edinburgh|Seattle|Houston|Manchester|Oxford|"
        "Prague|Singapore|New York|San Francisco|Hong Kong|Los Angeles",
        "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
        "month": "January|February|March|April|May|June|July|August|September|October|November|December",
        "thing": "book|letter|chair|bottle|picture|box|coin|ticket|phone|key|jacket|bicycle|lamp|table|"
        "camera|watch|computer|bag|blanket|guitar|message|map|report|package|parcel|newspaper",
        "things": "books|letters|chairs|bottles|pictures|boxes|coins|tickets|phones|keys|jackets|lamps|"
        "tables|cameras|watches|bags|blankets|messages|maps|reports|apples|oranges|eggs|cookies|"
        "cups|plates",
        "food": "bread|milk|butter|cheese|rice|soup|salad|chicken|fish|pasta|coffee|tea|sugar|honey|yogurt|"
        "juice|chocolate|cereal|lettuce|pepper|salt|garlic|ginger|orange juice|olive oil|"
        "peanut butter|ice cream|scrambled eggs",
        "place": "the kitchen|the garden|the office|the station|the airport|the library|the museum|"
        "the hospital|the park|the beach|the school|the market|the bakery|the garage|"
        "the living room|the post office|the hotel|the restaurant|the corner|the supermarket",
        "weather": "sunny|cloudy|windy|rainy|foggy|cold|warm|hot|humid|stormy|snowy|dry",
        "mood": "happy|sorry|glad|afraid|sure|proud|worried|surprised|excited|tired|busy|ready|hungry|late",
        "quality": "good|bad|small|large|heavy|light|cheap|expensive|old|new|quiet|loud|simple|difficult|"
        "beautiful|strange|wonderful|terrible|useful|boring|interesting|delicious|perfect",
        "color": "red|blue|green|yellow|black|white|brown|purple|orange|gray|pink",
        "family": "my mother|my father|my sister|my brother|my wife|my husband|my daughter|my son|my aunt|"
        "my uncle|my grandmother|my cousin|our neighbor|a friend of mine|my boss|the teacher",
        "do": "call you back|clean the kitchen|cook dinner|finish the report|go for a walk|"
        "read the newspaper|take the bus|wash the dishes|write an email|buy some flowers|"
        "feed the cat|fix the roof|walk the dog|learn to swim|play the piano|open the window|"
        "close the door|turn off the lights|wait outside|book a table|check the weather|"
        "change the password|move the meeting|charge the phone",
        "doing": "cooking dinner|reading a book|watching a movie|working late|playing outside|"
        "taking a shower|waiting for the bus|looking for my keys|talking on the phone|"
        "learning Spanish|cleaning up|baking a cake|driving home|listening to music|"
        "getting dressed|having lunch",
        "when": "today|tomorrow|tonight|this morning|this afternoon|this evening|next week|next {day}|"
        "on {day}|at the weekend|in {2-12} minutes|in an hour|later|right now|before lunch|"
        "after work|at {1-12} o'clock|as soon as possible",
        "past": "yesterday|last night|last week|last {day}|this morning|{2-20} years ago|an hour ago|"
        "in {month}|a few days ago|when I was young",
        "ordinal": "first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|twelfth|twentieth",
        "answer": "Yes|No|Maybe|Sure|Of course|Certainly|Exactly|Absolutely|Not really|Not yet|Never mind|"
        "Perhaps|Sometimes|Never|Always|Definitely|Probably|Nothing|Everything|Nobody|Everybody|"
        "Great|Wonderful|Perfect|Excellent|Fine|Okay|All right|Thanks|Thank you|Welcome|Sorry|"
        "Please|Congratulations|Really|Correct|Wrong|True|Right|Left|Stop|Wait|Listen|Look|Go|Help|"
        "Today|Tomorrow|Later|Soon|Now|Here|Good idea|No problem|No way|Me too|Not at all|I see|"
        "I know|Why not|Well done|Good luck|Take care|See you soon|Not now|That's right|That's it|"
        "You're welcome|I agree|I think so|I hope so|I don't know|It depends|Of course not|"
        "Never again|One moment|Just a second|Come in|Sit down|Be careful|Don't worry|Watch out|"
        "Hurry up|Slow down|Excuse me|Pardon me|Go ahead",
        "greeting": "Hello|Hi|Hey|Good morning|Good afternoon|Good evening|Good night|Welcome|Goodbye|Bye|"
        "Welcome back|Hello there|Hi there|Greetings|Nice to meet you|See you {when}|See you later|"
        "Happy birthday|Merry Christmas|Happy new year|Have a nice day|Sleep well|Bon appetit",
        "not": "isn't|wasn't|won't|can't|couldn't|wouldn't|shouldn't",
        "clause": "I didn't hear the phone|we've never been to {city}|it's getting {weather}|she's {doing}|"
        "they're {doing}|he won't {do}|I'd like to {do}|you should {do}|we'll {do} {when}|"
        "{family} is {doing}|{name} isn't here|there's no {food} left|I'm {mood}|"
        "the {thing} is broken|everybody was {mood}|it was too {weather} to go out|"
        "the train was late|{name} and {name} are {mood}|nobody could find the {thing}|"
        "we're going to {city} {when}|that doesn't matter|I can't remember it|"
        "she bought the {color} {thing} {past}|we had {food} for breakfast|"
        "the {thing} costs {2-90} dollars|I've lost my {thing}|he lives near {place}|"
        "you'd better {do}|the {ordinal} one was {quality}",
        "joint": ", but |, and |, so | because | although | while |, or | before ",
    }.items()
}

# (weight, patterns)
PATTERNS = (
    (2, (
        "{answer}.", "{answer}!", "{answer}?", "{greeting}.", "{greeting}!", "{answer}, {name}.",
    )),
    (2, (
        "{greeting}, {name}.", "{greeting}, {name}!", "{greeting}, {title} {surname}.",
        "{answer}, thank you.", "Hello, how are you {when}?", "{answer}, I'm {doing}.",
        "Thanks, {name}, that's very kind of you.", "Hi {name}, it's {name}.",
        "Hello {name}, how was {city}?", "My name is {name} {surname}.",
    )),
    (3, (
        "What's that?", "Who's there?", "Where's {name}?", "Where is the {thing}?", "Why not {when}?",
        "How old is {family}?", "What time is it?", "What's the weather like in {city}?",
        "Is it {weather} {when}?", "Can you {do}, please?", "Could you {do} {when}?",
        "Would you like some {food}?", "Do you like {food}?", "Did you {do} {past}?",
        "Have you seen my {color} {thing}?", "Are you {mood}?", "Aren't you {mood}?",
        "How many {things} are there in {place}?", "How much is the {color} {thing}?", "Who is {doing}?",
        "Shall we {do} {when}?", "What are you doing {when}?", "When does the train to {city} leave?",
        "Don't you want to {do}?", "Which {thing} is yours, the {color} one or the {color} one?",
        "Is this {thing} {quality}?", "Whose {thing} is this?", "Why is {name} {doing}?", "Really? Why?",
        "How far is it from {city} to {city}?", "You're {mood}, aren't you?", "It's {quality}, isn't it?",
    )),
    (3, (
        "I'm {mood}.", "I'm {doing}.", "She's {doing}.", "It's {weather} {when}.", "We're {mood}.",
        "They aren't {mood}.", "I don't think so.", "He doesn't like {food}.", "I can't {do} {when}.",
        "We won't {do}.", "That's {quality}.", "It isn't {quality}.", "You shouldn't {do} {when}.",
        "I've already had {food}.", "She hasn't arrived yet.", "I'll {do} {when}.", "Let's {do}!",
        "There's a {thing} in {place}.", "It {not} {quality}.", "I'd rather {do}.", "How {quality}!",
        "Don't forget to {do}.", "Please {do}.", "I love {food}!", "Here's your {thing}.",
        "Turn left at {place}.", "{family} is {mood}.", "{name} was {doing} {past}.",
        "The {thing} is {color}.", "Remind me to {do} {when}.", "I wasn't {doing}, I was {doing}.",
        "You're {quality} at this.", "That wasn't {quality} at all.",
    )),
    (2, (
        "We need {food}, {food} and {food}.", "Buy {food}, {food}, {food}, and {food}.",
        "{name}, {name} and {name} are {doing}.", "{day}, {day} or {day}?", "One, two, three, go!",
        "The colors are {color}, {color}, {color} and {color}.",
        "I visited {city}, {city} and {city} {past}.", "First, {do}, then {do}, and finally, {do}.",
        "She has {2-9} {things}, {2-9} {things} and a {thing}.",
        "The numbers are {1-99}, {1-99}, {1-99} and {1-99}.", "{1-9}, {1-9}, {1-9}, {1-9}.",
    )),
    (3, (
        "It's {1-12}:{10-59}.", "It's {1-12} o'clock.", "The meeting starts at {1-12}:{10-59} {when}.",
        "I have {2-99} {things}.", "She is {5-95} years old.", "That's {2-99} dollars, please.",
        "It costs ${2-99}.", "It's {2-40} degrees in {city}.", "The answer is {1-999}.", "Chapter {1-40}.",
        "Number {1-99}.", "Room {100-999} is on the {ordinal} floor.", "He was born in {1900-2020}.",
        "My birthday is on {month} {1-28}.", "Today is {day}, {month} {1-28}.",
        "Take bus {1-99} to {place}.", "It's {2-900} miles from {city} to {city}.",
        "I'll be there in {2-59} minutes.", "About {10-99} percent of them agreed.",
        "We sold {100-9999} {things} {past}.", "Page {1-400}, please.", "Set an alarm for {1-12}:{10-59}.",
        "Set a timer for {2-90} minutes.", "There are {2-60} people in {place}.",
        "Add {2-20} {things} to my list.", "Flight {100-999} to {city} leaves from gate {1-60}.",
        "{2-20} plus {2-20} is {4-40}.", "We waited for {2-12} hours and {2-59} minutes.",
    )),
    (4, (
        "I think {clause}.", "{family} said that {clause}.", "If {clause}, {clause}.",
        "When {clause}, {clause}.", "{clause}{joint}{clause}.", "Well, {clause}.", "{clause}, {name}!",
        "Did you know that {clause}?", "No, {clause}.", "Yes, {clause}.", "Oh, {clause}!",
        "I'm sorry, {clause}.", "{name} told me {clause}.",
    )),
    (2, (
        "{clause}{joint}{clause}{joint}{clause}.", "I wanted to {do} {past}, but {clause}, so {clause}.",
        "{name} asked {name} whether {clause}, and {clause}.", "On {day}, {clause}; on {day}, {clause}.",
        "Although {clause}, {family} wanted to {do}, and {clause}.",
        "First {name} said that {clause}, then {clause}, and in the end {clause}.",
    )),
)  # fmt: skip

_NAME = re.compile(r"\{([a-z_]+)\}")
_NUMBER = re.compile(r"\{(\d+)-(\d+)\}")


def everyday(
    count: int,
    seed: int = 0,
    patterns: Sequence[tuple[int, Sequence[str]]] = PATTERNS,
    words: Mapping[str, Sequence[str]] = WORDS,
) -> Iterator[str]:
    """Yield `count` different sentences. patterns: groups with weights."""
    draw = random.Random(seed)
    seen: set[str] = set()
    weights = [weight for weight, _ in patterns]
    while len(seen) < count:
        (group,) = draw.choices(patterns, weights)
        text = _filled(draw.choice(group[1]), words, draw)
        if text not in seen:
            seen.add(text)
            yield text


def _filled(text: str, words: Mapping[str, Sequence[str]], draw: random.Random) -> str:
    while _NAME.search(text):
        text = _NAME.sub(lambda name: draw.choice(words[name[1]]), text)
    text = _NUMBER.sub(lambda ends: str(draw.randint(int(ends[1]), int(ends[2]))), text)
    return text[0].upper() + text[1:]
