"""What `llmkit bench parity` asks: beginnings that people might write, in prose, dialogue, code, lists and other languages; from
one token of SmolLM2's to some fifty; long and short ones in turn."""

TEXTS = (
    "Hello",
    "Am Anfang war das Wort, und das Wort",
    "<|im_start|>user\nWho are you, and what can you do for me?<|im_end|>\n<|im_start|>assistant\n",
    "你好，请介绍一下大语言模型",
    "SELECT name, COUNT(*) FROM users WHERE",
    "Alice: Did you see the match last night?\nBob: I did! I could not believe the last goal.\nAlice:",
    "中国的首都是北京，法国的首都是",
    "Once upon a time there was a small robot who",
    "<|im_start|>user\nExplain in two sentences why the sky is blue.<|im_end|>\n<|im_start|>assistant\n",
    "Q: What is 17 + 25?\nA:",
    "My three favourite colours are red, blue and",
    "To find the area of a circle, first measure its radius. Then square the radius and multiply the result by",
    "def fibonacci(n):\n    ",
    "{\"name\": \"Ada Lovelace\", \"born\": 1815, \"known for\":",
    "The old lighthouse keeper had not spoken to anyone in three weeks when, one stormy evening, there was a knock at",
    "The capital of France is",
    "Dear hiring committee,\n\nI am writing to apply for the position of",
    "Breaking news: scientists at a small university in the north of Norway reported on Tuesday that they have found "
    "a way to",
    "In 1969, the first humans",
    "import numpy as np\n\ndef softmax(x):\n    \"\"\"Normalise the last axis.\"\"\"\n",
    "class Stack:\n    \"\"\"Last in, first out.\"\"\"\n\n    def __init__(self):\n        self.items = []\n\n"
    "    def push(self, item):\n        self.items.append(item)\n\n    def pop(self):\n        ",
    "for (int i = 0; i < n; i++) {",
    "Ingredients for four people:\n- 400 g of spaghetti\n- 2 cloves of garlic\n-",
    "Machine learning models learn patterns from data. A neural network consists of layers of simple units, each of "
    "which adds up its inputs, applies a function that is not linear, and hands the result to the next layer. During "
    "training,",
    "La vie est belle quand on sait",
    "| planet | moons |\n|---|---|\n| Mercury | 0 |\n| Venus | 0 |\n| Earth | 1 |\n| Mars |",
    "The train left the station at half past six, just as the sun began to rise over the frozen fields. In the last "
    "carriage sat a woman with a violin case on her knees. She had not slept, and she kept looking at the clock "
    "above the door, because",
    "Water boils at a temperature of",
    "The three laws of thermodynamics can be put simply. First, energy is never lost. Second,",
    "A good essay begins with a question that the writer truly wants to answer. It goes on to weigh what others have "
    "said about it, is honest about what is not known, and ends somewhere other than where it began. The first thing "
    "that a student should do is to",
    "To be, or not to be, that is the",
    "Photosynthesis is the process by which plants turn sunlight, water and carbon dioxide into",
)
