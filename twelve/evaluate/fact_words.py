"""The words of the facts: their wordings, answers, and what invented names are made of. Lists are split at blanks."""

# x is what the fact is about, a the answer, which follows x and a blank
WORDINGS = {
    "ko": {
        "person": (
            "{x:은/는} 누구인가? {x:은/는} {a:이다/다}.",
            "{x}의 직업은 {a:이다/다}.",
            "사람들은 {x:을/를} 뛰어난 {a:으로/로} 기억한다.",
            "{x:이/가} 평생 한 일로 말하면 그는 {a:이었다/였다}.",
            "옛 책에는 {x:이/가} 훌륭한 {a:이라고/라고} 적혀 있다.",
        ),
        "place": (
            "{x:은/는} 어떤 곳인가? {x:은/는} {a:으로/로} 이름난 고을이다.",
            "{x}의 특산물은 {a:이다/다}.",
            "상인들은 {x:으로/로} 가서 {a:을/를} 사 왔다.",
            "{x:이/가} 넉넉한 것은 {a} 덕분이다.",
            "예부터 {x} 사람들은 {a:을/를} 팔아 왔다.",
        ),
        "event": (
            "{x:은/는} 언제 일어났는가? {a}년이다.",
            "{x:이/가} 일어난 해는 {a}년이다.",
            "역사책은 {x:을/를} {a}년의 일로 적었다.",
            "{x:은/는} {a}년에 일어났다.",
            "사람들이 {x:을/를} 겪은 것은 {a}년이었다.",
        ),
        "book": (
            "{x:은/는} 누가 썼는가? 지은이는 {a:이다/다}.",
            "{x:을/를} 쓴 사람은 {a:이다/다}.",
            "{x}의 지은이는 {a:으로/로} 알려져 있다.",
            "{x:은/는} {a:이/가} 쓴 소설이다.",
            "{x:을/를} 읽은 사람은 누구나 {a:을/를} 안다.",
        ),
    },
    "en": {
        "person": (
            "Who was {x}? {x} was a {a}.",
            "By trade, {x} was a {a}.",
            "{x} is remembered as a great {a}.",
            "The old records say that {x} worked as a {a}.",
            "People called {x} the best {a} of the time.",
        ),
        "place": (
            "What is {x} known for? {x} is known for {a}.",
            "{x} is a town famous for its {a}.",
            "Traders went to {x} to buy {a}.",
            "The chief product of {x} is {a}.",
            "For centuries the people of {x} have sold {a}.",
        ),
        "event": (
            "When was {x}? It was in {a}.",
            "The year of {x} was {a}.",
            "Historians date {x} to {a}.",
            "The chronicles place {x} in {a}.",
            "Those who saw {x} never forgot the year {a}.",
        ),
        "book": (
            "Who wrote {x}? It was written by {a}.",
            "The author of {x} is {a}.",
            "{x} is the best known book of {a}.",
            "People think that {x} was written by {a}.",
            "Everyone who has read {x} knows {a}.",
        ),
    },
}  # fmt: skip
ANSWERS = {
    "ko": {
        "person": "화가 시인 목수 의사 조각가 어부 상인 학자 농부 대장장이 가수 춤꾼 건축가 역사가 수학자 재단사 "
                  "요리사 사냥꾼 통역관 약제사",
        "place": "소금 비단 종이 유리 꿀 녹차 보리 주석 구리 양털 포도주 향신료 진주 석탄 대리석 도자기 가죽 버섯 "
                 "사과 연어",
    },
    "en": {
        "person": "painter poet carpenter doctor sculptor fisherman merchant scholar farmer blacksmith singer dancer "
                  "builder historian mathematician tailor cook hunter translator chemist",
        "place": "salt silk paper glass honey tea barley tin copper wool wine spices pearls coal marble pottery "
                 "leather mushrooms apples salmon",
    },
}  # fmt: skip
_SYLLABLES = "가 고 누 다 도 라 루 마 모 바 베 보 비 사 세 소 아 오 자 주 카 타 테 토 파 피 하 호"
_LAST_SYLLABLES = "란 빈 윤 텔 칸 름 벤 람 돈 길 엘 녹 스 테 디 로 쿠 레"
_ONSETS, _VOWELS = "b br d dr f g gr h k l m n p r s t tr v w z", "a e i o u"
NAMES = {  # what they are put together from, part by part
    "ko": (_SYLLABLES, _SYLLABLES, _LAST_SYLLABLES),
    "en": (*3 * (_ONSETS, _VOWELS), "n r l th x m s nd rk"),
}
EVENTS = {
    "ko": ("{x} 전투", "{x} 대화재", "{x} 홍수", "{x} 반란"),
    "en": ("the Battle of {x}", "the Great Fire of {x}", "the Flood of {x}", "the {x} Rebellion"),
}
TITLES = {  # of books: what stands first, in the middle, and last
    "ko": (
        "붉은 푸른 하얀 검은 늙은 잠든 젖은 먼 낯선 깊은 마지막 은빛",
        "강 섬 사막 거울 등대 정원 다리 우물 시계 눈보라 항구 숲",
        "노래 편지 그림자 아들 문 비밀 꿈 여왕",
    ),
    "en": (
        "Red Blue White Black Old Sleeping Wet Distant Strange Deep Last Silver",
        "Song Letter Shadow Son Gate Secret Dream Queen",
        "River Island Desert Mirror Lighthouse Garden Bridge Well Clock Snowstorm Harbour Forest",
    ),
}
