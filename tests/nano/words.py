"""Word lists and small tables of facts for the text generator (`grammar.py`)."""

from __future__ import annotations

GIRLS = "Anna Mia Lily Emma Ruth Clara Nora Zoe Ivy Ella Rosa Vera Jane Alice Sofia Tara Maya Lena Olive Hazel Iris June Kate Wendy".split()
BOYS = (
    "Tom Ben Leo Max Sam Jack Noah Paul Oscar Felix Hugo Peter Adam Simon Theo Luke Owen Finn Carl Ralph Henry Oliver Victor Walter".split()
)
COLORS = "red blue green yellow white black brown orange purple pink gray silver golden".split()
SIZES = "small big tiny large huge little tall short long wide".split()
FEELINGS = "happy sad tired hungry scared proud calm excited lonely curious surprised grateful worried brave angry".split()
TRAITS = "kind brave clever shy curious patient stubborn gentle careful cheerful honest lazy quick quiet wise".split()
WEATHER = "sunny rainy windy cloudy snowy foggy stormy cold warm hot".split()
TIMES = ["morning", "evening", "afternoon", "night", "spring day", "summer day", "autumn day", "winter day"]
PLACES = (
    "forest,garden,river,lake,mountain,village,farm,beach,cave,meadow,valley,castle,harbor,island,market,school,library,mill,bridge,barn,"
    "tower,desert,swamp,hill,orchard,kitchen,station,museum,park,well"
).split(",")
THINGS = (
    "lamp,key,map,coin,book,ring,rope,basket,bottle,bell,clock,drum,flute,hat,kite,ladder,letter,mirror,pencil,shell,stone,sword,whistle,"
    "blanket,box,candle,feather,hammer,jar,necklace,scarf,telescope,umbrella,violin,wagon,compass,lantern,boat,crown,button"
).split(",")
FOODS = "bread,cheese,soup,honey,apples,berries,cake,milk,nuts,rice,carrots,pie,fish,beans,cookies,pears,plums,corn,jam,eggs".split(",")
VERBS_MOVE = "walked ran hurried wandered hiked rode sailed crept marched went".split()
SKILLS = "sing,swim,paint,dance,cook,read,write,climb,fish,knit,juggle,whistle,ride a horse,build a boat,play the flute".split(",")

# name: (class, legs, food, home, sound)
ANIMALS = {
    "fox": ("mammal", 4, "mice", "forest", "barks"), "wolf": ("mammal", 4, "meat", "forest", "howls"),
    "bear": ("mammal", 4, "berries and fish", "forest", "growls"), "rabbit": ("mammal", 4, "grass", "meadow", "squeaks"),
    "mouse": ("mammal", 4, "seeds", "field", "squeaks"), "cat": ("mammal", 4, "mice", "house", "meows"),
    "dog": ("mammal", 4, "meat", "house", "barks"), "horse": ("mammal", 4, "hay", "stable", "neighs"),
    "cow": ("mammal", 4, "grass", "farm", "moos"), "sheep": ("mammal", 4, "grass", "farm", "bleats"),
    "pig": ("mammal", 4, "corn", "farm", "oinks"), "goat": ("mammal", 4, "grass", "farm", "bleats"),
    "lion": ("mammal", 4, "meat", "savanna", "roars"), "tiger": ("mammal", 4, "meat", "jungle", "roars"),
    "elephant": ("mammal", 4, "leaves", "savanna", "trumpets"), "monkey": ("mammal", 2, "fruit", "jungle", "chatters"),
    "owl": ("bird", 2, "mice", "forest", "hoots"), "eagle": ("bird", 2, "fish", "mountain", "screeches"),
    "duck": ("bird", 2, "water plants", "lake", "quacks"), "hen": ("bird", 2, "corn", "farm", "clucks"),
    "crow": ("bird", 2, "seeds", "field", "caws"), "goose": ("bird", 2, "grass", "lake", "honks"),
    "frog": ("amphibian", 4, "flies", "pond", "croaks"), "toad": ("amphibian", 4, "insects", "garden", "croaks"),
    "snake": ("reptile", 0, "mice", "desert", "hisses"), "turtle": ("reptile", 4, "leaves", "pond", "hisses"),
    "bee": ("insect", 6, "nectar", "hive", "buzzes"), "ant": ("insect", 6, "seeds", "anthill", "clicks"),
    "beetle": ("insect", 6, "leaves", "garden", "clicks"), "spider": ("arachnid", 8, "flies", "web", "hums"),
}  # fmt: skip
# country: (capital, continent)
COUNTRIES = {
    "France": ("Paris", "Europe"), "Germany": ("Berlin", "Europe"), "Italy": ("Rome", "Europe"), "Spain": ("Madrid", "Europe"),
    "Portugal": ("Lisbon", "Europe"), "Greece": ("Athens", "Europe"), "Poland": ("Warsaw", "Europe"), "Norway": ("Oslo", "Europe"),
    "Sweden": ("Stockholm", "Europe"), "Finland": ("Helsinki", "Europe"), "Denmark": ("Copenhagen", "Europe"),
    "Ireland": ("Dublin", "Europe"), "Austria": ("Vienna", "Europe"), "Hungary": ("Budapest", "Europe"), "Egypt": ("Cairo", "Africa"),
    "Kenya": ("Nairobi", "Africa"), "Ghana": ("Accra", "Africa"), "Morocco": ("Rabat", "Africa"), "Japan": ("Tokyo", "Asia"),
    "China": ("Beijing", "Asia"), "India": ("New Delhi", "Asia"), "Thailand": ("Bangkok", "Asia"), "Vietnam": ("Hanoi", "Asia"),
    "Nepal": ("Kathmandu", "Asia"), "Canada": ("Ottawa", "North America"), "Mexico": ("Mexico City", "North America"),
    "Cuba": ("Havana", "North America"), "Brazil": ("Brasilia", "South America"), "Peru": ("Lima", "South America"),
    "Chile": ("Santiago", "South America"), "Argentina": ("Buenos Aires", "South America"), "Australia": ("Canberra", "Australia"),
}  # fmt: skip
# job: (tool, what they do)
JOBS = {
    "baker": ("an oven", "bakes bread"), "carpenter": ("a saw", "builds tables and chairs"), "painter": ("a brush", "paints pictures"),
    "farmer": ("a plow", "grows food"), "tailor": ("a needle", "sews clothes"), "doctor": ("a stethoscope", "helps sick people"),
    "teacher": ("a book", "teaches children"), "gardener": ("a shovel", "takes care of plants"), "cook": ("a pot", "makes meals"),
    "pilot": ("a plane", "flies across the sky"), "sailor": ("a ship", "travels over the sea"),
    "blacksmith": ("a hammer", "works with iron"),
    "writer": ("a pen", "writes stories"), "fisher": ("a net", "catches fish"), "potter": ("a kiln", "makes bowls of clay"),
    "miner": ("a pick", "digs for stone and metal"),
}  # fmt: skip
# thing: (color, taste or feel)
KINDS = {
    "lemon": ("yellow", "sour"), "banana": ("yellow", "sweet"), "strawberry": ("red", "sweet"), "grass": ("green", "soft"),
    "snow": ("white", "cold"), "coal": ("black", "hard"), "sand": ("yellow", "dry"), "honey": ("golden", "sweet"),
    "salt": ("white", "salty"),
    "chocolate": ("brown", "sweet"), "ice": ("white", "cold"), "blood": ("red", "warm"), "milk": ("white", "smooth"),
    "pepper": ("black", "hot"), "carrot": ("orange", "crunchy"), "silk": ("white", "smooth"),
}  # fmt: skip
OPPOSITES = (
    "hot cold,big small,fast slow,light dark,happy sad,old young,up down,open closed,wet dry,full empty,hard soft,rich poor,strong weak,"
    "early late,loud quiet,clean dirty,long short,near far,high low,sweet sour,thick thin,day night,first last,left right"
).split(",")
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty"
).split()
NOUNS = sorted({*THINGS, *PLACES, *ANIMALS, *KINDS, *FOODS, *JOBS})

# question and answer; the questions are alternatives of one another
EXPLANATIONS: list[tuple[tuple[str, ...], str]] = [
    (("Why is the sky blue?", "What makes the sky blue?"),
     "The sky is blue because air scatters blue light more than red light. The scattered blue light reaches our eyes from every side."),
    (("Why do leaves fall in autumn?", "Why do trees lose their leaves?"),
     "Trees drop their leaves in autumn to save water and energy. In spring they grow new leaves."),
    (("Why does ice float?", "Why does ice float on water?"),
     "Ice floats because water grows when it freezes. The same weight takes more room, so ice is lighter than water."),
    (("What is rain?", "Where does rain come from?"),
     "Rain is water that falls from clouds. The sun lifts water into the air, it cools down, and it falls as drops."),
    (("Why do we sleep?", "Why do people need sleep?"),
     "We sleep so that the body can rest and the brain can sort what it has learned. Without sleep we become tired and slow."),
    (("What is the moon?", "Tell me about the moon."),
     "The moon is a ball of rock that goes around the earth. It takes about one month to go around once."),
    (("Why does the moon shine?", "How does the moon shine?"),
     "The moon does not make light. It shines because it reflects the light of the sun."),
    (("What is the sun?", "Tell me about the sun."),
     "The sun is a star. It is a very hot ball of gas that gives light and warmth to the earth."),
    (("Why is the sea salty?", "Where does the salt in the sea come from?"),
     "Rivers wash salt out of rocks and carry it to the sea. The water goes back into the air, but the salt stays."),
    (("How do birds fly?", "Why can birds fly?"),
     "Birds fly with their wings. The wings push air down, and the air lifts the bird up. Their bones are light."),
    (("How do fish breathe?", "How can fish breathe under water?"),
     "Fish breathe with gills. Water flows through the gills, and the gills take the oxygen out of it."),
    (("How do bees make honey?", "Where does honey come from?"),
     "Bees collect nectar from flowers and bring it to the hive. There it dries and becomes honey."),
    (("What is a kiln?", "What is a kiln for?"),
     "A kiln is a very hot oven. Potters fire bowls of clay in it until they are hard."),
    (("How is bread made?", "How do you make bread?"),
     "Bread is made of flour, water, salt and yeast. You mix a dough, let it rise, and bake it in an oven."),
    (("What is a volcano?", "Tell me about volcanoes."),
     "A volcano is a mountain with an opening to the hot inside of the earth. Sometimes melted rock flows out of it."),
    (("Why do we have seasons?", "What causes the seasons?"),
     "We have seasons because the axis of the earth is tilted. For half of the year one side gets more sunlight than the other."),
    (("What is a rainbow?", "How does a rainbow form?"),
     "A rainbow appears when sunlight passes through drops of rain. The drops split the light into its colors."),
    (("Why do cats purr?", "When do cats purr?"), "Cats purr when they feel safe and happy. Sometimes they also purr to calm themselves."),
    (("What is a desert?", "Tell me about deserts."),
     "A desert is a dry place where it hardly ever rains. Only few plants and animals live there."),
    (("Why do we eat?", "Why do people need food?"), "Food gives us energy to move, to think and to grow. Without food we become weak."),
    (("What do plants need?", "What does a plant need to grow?"), "A plant needs water, light, air and soil to grow."),
    (("What is a shadow?", "How is a shadow made?"), "A shadow is a dark place that appears when something blocks the light."),
    (("What is a computer?", "What does a computer do?"),
     "A computer is a machine that follows instructions. It works with numbers, and it can do many steps very quickly."),
    (("What is a language model?", "What are you?", "Who are you?"),
     "I am a small language model. I read words as numbers and predict which word comes next."),
    (("What is your name?", "How are you called?"), "My name is Nano. I am a small language model."),
    (("How are you?", "How do you do?"), "I am fine, thank you. How can I help you?"),
    (("What can you do?", "How can you help me?"),
     "I can tell short stories, answer simple questions, count, add small numbers, and remember what you told me."),
    (("Why do we wear clothes?", "What are clothes for?"), "Clothes keep us warm and dry, and they protect our skin from the sun."),
    (("What is money for?", "Why do people use money?"),
     "Money makes trading easy. You can sell one thing today and buy another thing later."),
    (("Why is exercise good?", "Why should I move more?"),
     "Moving makes the heart and the muscles strong, and it helps you to sleep well."),
    (("What is an island?", "Tell me about islands."),
     "An island is land with water all around it. Some islands are tiny and some are huge."),
    (("What is thunder?", "Why does it thunder?"),
     "Thunder is the sound of lightning. The lightning heats the air so fast that the air bursts apart with a bang."),
    (("How does a boat float?", "Why do boats float?"),
     "A boat floats because it pushes water aside. The water pushes back and carries the boat."),
    (("Why do we have bones?", "What are bones for?"), "Bones hold the body up and protect soft parts such as the heart and the brain."),
    (("What is a friend?", "What makes a good friend?"),
     "A friend is someone who likes you, listens to you and helps you when you need it."),
    (("How do I make tea?", "How is tea made?"),
     "Boil some water, pour it over the tea leaves, wait for three minutes, and take the leaves out."),
]  # fmt: skip
