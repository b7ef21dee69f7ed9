"""A few plain sentences in many languages and some code, of our own words: for passports, and checks of exports."""

SAMPLES: dict[str, str] = {
    "English": (
        "The river rose in the night, and by morning the old bridge was gone. We walked twelve miles to "
        "the next village, where someone's grandmother gave us bread, soup and a place by the stove."
    ),
    "German": (
        "In der Nacht stieg der Fluss, und am Morgen war die alte Brücke fort. Wir gingen zwanzig "
        "Kilometer bis zum nächsten Dorf, wo uns eine Großmutter Brot, Suppe und einen Platz am Ofen gab."
    ),
    "French": (
        "La rivière est montée pendant la nuit et, au matin, le vieux pont avait disparu. Nous avons "
        "marché vingt kilomètres jusqu'au prochain village, où une grand-mère nous a donné du pain et de "
        "la soupe."
    ),
    "Spanish": (
        "El río creció durante la noche y por la mañana el viejo puente ya no estaba. Caminamos veinte "
        "kilómetros hasta el siguiente pueblo, donde una abuela nos dio pan, sopa y un sitio junto a la "
        "estufa."
    ),
    "Portuguese": (
        "O rio subiu durante a noite e, de manhã, a velha ponte tinha desaparecido. Andámos vinte "
        "quilómetros até à aldeia seguinte, onde uma avó nos deu pão, sopa e um lugar ao pé do fogão."
    ),
    "Italian": (
        "Il fiume è salito durante la notte e al mattino il vecchio ponte non c'era più. Abbiamo camminato "
        "venti chilometri fino al villaggio vicino, dove una nonna ci ha dato pane e minestra."
    ),
    "Dutch": (
        "De rivier steeg in de nacht en 's ochtends was de oude brug verdwenen. We liepen twintig "
        "kilometer naar het volgende dorp, waar een grootmoeder ons brood en soep gaf."
    ),
    "Swedish": (
        "Floden steg under natten och på morgonen var den gamla bron borta. Vi gick två mil till nästa by, "
        "där en mormor gav oss bröd, soppa och en plats vid spisen."
    ),
    "Finnish": (
        "Joki nousi yöllä, ja aamulla vanha silta oli poissa. Kävelimme kaksikymmentä kilometriä "
        "seuraavaan kylään, jossa isoäiti antoi meille leipää ja keittoa."
    ),
    "Polish": (
        "W nocy rzeka wezbrała i rano starego mostu już nie było. Szliśmy dwadzieścia kilometrów do "
        "następnej wsi, gdzie czyjaś babcia dała nam chleb, zupę i miejsce przy piecu."
    ),
    "Czech": (
        "V noci se řeka zvedla a ráno už starý most nestál. Šli jsme dvacet kilometrů do další vesnice, "
        "kde nám něčí babička dala chléb, polévku a místo u kamen."
    ),
    "Turkish": (
        "Gece nehir yükseldi ve sabah eski köprü yerinde yoktu. En yakın köye kadar yirmi kilometre "
        "yürüdük; orada bir büyükanne bize ekmek ve çorba verdi."
    ),
    "Vietnamese": (
        "Đêm qua nước sông dâng lên và đến sáng cây cầu cũ không còn nữa. Chúng tôi đi bộ hai mươi cây số "
        "đến ngôi làng bên cạnh, nơi một bà cụ cho chúng tôi bánh mì và canh nóng."
    ),
    "Indonesian": (
        "Sungai naik pada malam hari dan paginya jembatan tua itu sudah hilang. Kami berjalan dua puluh "
        "kilometer ke desa berikutnya, dan seorang nenek memberi kami roti dan sup."
    ),
    "Greek": (
        "Το ποτάμι φούσκωσε τη νύχτα και το πρωί η παλιά γέφυρα είχε χαθεί. Περπατήσαμε είκοσι χιλιόμετρα "
        "ως το επόμενο χωριό, όπου μια γιαγιά μας έδωσε ψωμί και σούπα."
    ),
    "Russian": (
        "Ночью река поднялась, и к утру старого моста не стало. Мы прошли двадцать километров до соседней "
        "деревни, где чья-то бабушка дала нам хлеба, супа и место у печки."
    ),
    "Ukrainian": (
        "Уночі річка піднялася, і до ранку старого мосту не стало. Ми пройшли двадцять кілометрів до "
        "сусіднього села, де чиясь бабуся дала нам хліба й супу."
    ),
    "Hebrew": (
        "בלילה עלה הנהר, ובבוקר כבר לא היה הגשר הישן. הלכנו עשרים קילומטר עד הכפר הבא, ושם סבתא אחת נתנה "
        "לנו לחם ומרק חם."
    ),
    "Arabic": (
        "ارتفع النهر في الليل، وفي الصباح لم يبق الجسر القديم. مشينا عشرين كيلومترا إلى القرية التالية، "
        "حيث أعطتنا جدة خبزا وحساء ومكانا قرب الموقد."
    ),
    "Persian": (
        "شب آب رودخانه بالا آمد و صبح پل قدیمی دیگر نبود. بیست کیلومتر تا روستای بعدی راه رفتیم و "
        "مادربزرگی به ما نان و آش داد."
    ),
    "Hindi": (
        "रात में नदी चढ़ आई और सुबह तक पुराना पुल बह गया था। हम बीस किलोमीटर चलकर अगले गाँव पहुँचे, जहाँ "
        "एक दादी ने हमें रोटी और दाल दी।"
    ),
    "Bengali": ("রাতে নদীর জল বেড়ে গেল, আর সকালে পুরোনো সেতুটি আর ছিল না। আমরা কুড়ি কিলোমিটার হেঁটে পাশের গ্রামে গেলাম।"),
    "Thai": ("แม่น้ำขึ้นในตอนกลางคืน และพอถึงเช้าสะพานเก่าก็หายไป เราเดินยี่สิบกิโลเมตรไปยังหมู่บ้านถัดไป ที่นั่นคุณยายคนหนึ่งให้ขนมปังกับซุปแก่เรา"),
    "Chinese": (
        "夜里河水上涨,到了早晨,旧桥已经不见了。我们走了二十公里来到下一个村子,有位老奶奶给了我们面包和热汤,"
        "还让我们坐在炉子旁边。"
    ),
    "Japanese": (
        "夜のうちに川の水が増え、朝には古い橋がなくなっていた。私たちは二十キロ歩いて隣の村に着き、あるおば"
        "あさんがパンとスープをくれた。"
    ),
    "Korean": (
        "밤사이 강물이 불어나 아침에는 낡은 다리가 사라지고 없었다. 우리는 이십 킬로미터를 걸어 이웃 "
        "마을에 닿았고, 한 할머니가 빵과 국을 주셨다."
    ),
    "numbers": ("On 3 March 1987 the gauge read 4.75 m at 06:30, 1,204 m³/s; a year later 3.1415926 and 271828182845."),
    "Python code": (
        "def rise(levels: list[float], *, limit=4.75) -> int:\n"
        "    for day, level in enumerate(levels):\n"
        "        if level > limit and not levels[day - 1] > limit:\n"
        "            return day  # the first day\n"
        "    return -1\n"
    ),
    "C code": (
        "static int rise(const double *level, size_t n) {\n"
        "\tfor (size_t i = 0; i < n; ++i) {\n"
        "\t\tif (level[i] > 4.75) return (int)i;\n"
        "\t}\n"
        '\tprintf("never: %zu\\n", n);\n'
        "\treturn -1;\n"
        "}\n"
    ),
    "JSON": ('{"river": "Anna", "bridges": [{"id": 17, "open": false, "since": null}], "level_m": 4.75e0}\n'),
}
