"""Patterns of everyday Mandarin, the counterpart of `everyday` for English: short answers and long sentences,
questions, lists, numbers, times, dates and money. Dictionary words are drawn for {noun}, {verb}, {quality},
{town} and {idiom}."""

from __future__ import annotations

WORDS = {
    name: words.split("|")
    for name, words in {
        "family": "我|你|他|她|我们|他们|大家|我妈妈|他爸爸|我哥哥|她妹妹|我的朋友|我的同事|隔壁的邻居|"
        "王老师|李医生|张先生|陈小姐|小明|小红|老刘|爷爷|奶奶|经理|那个孩子|新来的同学",
        "name": "小王|小李|小张|王老师|李医生|赵经理|陈先生|周小姐|妈妈|爸爸|老师|各位|朋友|师傅|服务员",
        "city": "北京|上海|广州|深圳|杭州|南京|成都|西安|武汉|重庆|天津|苏州|青岛|大连|厦门|昆明|香港|"
        "台北|东京|巴黎|伦敦|纽约|莫斯科|悉尼",
        "place": "公园|学校|医院|超市|银行|车站|机场|图书馆|饭店|公司|教室|电影院|博物馆|菜市场|地铁站|"
        "体育馆|邮局|书店|咖啡馆|楼下|海边|山上|对面|路口|宾馆|厨房|院子里",
        "food": "苹果|香蕉|西瓜|米饭|面条|饺子|包子|鸡蛋|牛奶|豆腐|牛肉|鱼|青菜|红茶|绿茶|咖啡|果汁|面包|"
        "蛋糕|火锅|烤鸭|土豆|西红柿|豆浆|葡萄|热汤",
        "thing": "书|手机|电脑|雨伞|钥匙|杯子|衣服|帽子|眼镜|椅子|桌子|照片|礼物|行李|词典|报纸|自行车|"
        "钱包|票|地图|画|相机|毛衣|鞋子|盘子|本子",
        "when": "今天|明天|后天|昨天|今天早上|今天下午|今天晚上|明天上午|明天晚上|这个周末|下个星期|"
        "上个月|星期一|星期三|星期五|星期天|中午|半夜|去年夏天|明年春天|每天早上|平时|最近|刚才|待会儿|"
        "一会儿",
        "weather": "天气很好|下雨了|下雪了|风很大|有点儿冷|特别热|阴天|是晴天|比昨天凉快|雾很大|"
        "要刮台风了|越来越暖和了",
        "mood": "高兴|难过|生气|紧张|着急|满意|激动|害怕|奇怪|累|饿|渴|困|舒服|放心|失望|骄傲|无聊",
        "quality_plain": "好|漂亮|便宜|贵|干净|有意思|重要|简单|难|方便|安全|安静|热闹|新鲜|好吃|合适|"
        "有名|特别|清楚|远|近|大|小",
        "do": "去散步|看电影|听音乐|做饭|打扫房间|学习中文|写作业|跑步|游泳|打篮球|踢足球|买东西|喝茶|"
        "聊天|睡觉|上班|开会|看医生|坐地铁|骑自行车|打电话|发邮件|洗衣服|照顾孩子|去旅行|画画|唱歌|跳舞|"
        "等公共汽车|预订房间|换钱|准备考试|参观博物馆",
        "clause": "{family}{when}要{do}|{family}很{mood}|{place}离这儿很{quality_plain}|{when}{weather}|"
        "{family}不想{do}|{family}已经到{place}了|这个{thing}非常{quality_plain}|{family}喜欢吃{food}|"
        "{family}在{place}{do}|{family}把{thing}忘在{place}了|{family}没有时间{do}|{city}的{food}很有名|"
        "{family}还没买{thing}|{thing}被{family}拿走了|{family}从{city}来|路上的车太多了|事情没有那么简单|"
        "电影马上就要开始了",
        "joint": "，所以|，但是|，而且|，不过|，然后|，",
    }.items()
}

PATTERNS = (
    (3, (
        "你好！", "您好，请进。", "早上好！", "晚上好，{name}。", "晚安。", "谢谢。", "谢谢你，{name}！",
        "不客气。", "对不起。", "没关系。", "再见！", "明天见。", "好的。", "好，没问题。", "当然可以。",
        "不行。", "是的。", "不是。", "也许吧。", "我不知道。", "请稍等。", "等一下！", "欢迎光临！",
        "祝你生日快乐！", "新年快乐，万事如意！", "一路平安。", "辛苦了。", "太好了！", "真的吗？",
        "为什么？", "怎么了？", "请问，您贵姓？", "好久不见，{name}！", "麻烦您了。", "慢走，路上小心。",
        "保重身体。", "恭喜恭喜！",
    )),
    (4, (
        "{family}{when}去哪儿？", "{place}怎么走？", "这个{thing}多少钱？", "你吃{food}吗？",
        "{when}几点见面？", "{family}为什么这么{mood}？", "你会不会{do}？", "可以给我一杯{food}吗？",
        "我们{when}{do}，好吗？", "你的{thing}在哪儿？", "{city}的天气怎么样？",
        "有没有{quality_plain}一点儿的？", "这是谁的{thing}？", "你去过{city}没有？",
        "{family}什么时候回来？", "从{city}到{city}有多远？", "你想吃{food}还是{food}？",
        "洗手间在什么地方？", "{quality_plain}不{quality_plain}？", "你听说过{noun}吗？",
        "{noun}是什么意思？",
    )),
    (5, (
        "{clause}。", "{when}{weather}。", "我觉得{clause}。", "请把{thing}给我。", "别忘了{do}。",
        "{family}正在{do}呢。", "我想要{food}。", "{family}比{family}更{mood}。",
        "这里的{food}又{quality_plain}又{quality_plain}。", "祝你{when}玩得开心。", "让我们一起{do}吧。",
        "不要在{place}{do}。", "向前走，到{place}往左拐。", "听说{clause}。", "没想到{clause}。",
        "{family}一边{do}，一边{do}。", "{family}是{town}人。", "{family}真是{idiom}。",
    )),
    (3, (
        "我们需要{food}、{food}和{food}。", "{city}、{city}和{city}，我都去过。",
        "先{do}，再{do}，最后{do}。", "一，二，三，开始！", "{noun}、{noun}、{noun}。",
        "{noun}和{noun}有什么不同？", "红色、黄色、蓝色和白色。",
    )),
    (4, (
        "现在{1-12}点{10-59}分。", "{when}{1-12}点半，我们在{place}见面。", "一共{2-999}块钱。",
        "我今年{5-95}岁。", "今天是{1-12}月{1-28}号。", "{family}出生于{1900-2020}年{1-12}月。",
        "请在第{1-60}页写上名字。", "我的房间是{100-999}号。", "今天最高气温{10-40}度。",
        "还有百分之{2-99}没有完成。", "火车{2-12}点{10-59}分从{city}出发。", "{place}离这里{2-90}公里。",
        "我买了{2-20}本书。", "第{1-40}课很{quality_plain}。", "等了{2-12}个小时。",
        "{2-50}加{2-50}等于多少？", "全班有{20-60}个学生。", "坐{1-999}路公共汽车。",
    )),
    (4, (
        "{clause}{joint}{clause}。", "因为{clause}，所以{clause}。", "虽然{clause}，但是{clause}。",
        "如果{clause}，我们就{do}。", "{family}告诉我，{clause}。", "只要{clause}，{family}就会很{mood}。",
        "除了{do}以外，{family}还喜欢{do}。", "{clause}{joint}{clause}{joint}{clause}。",
        "{family}不但会{do}，而且{clause}。", "一到{place}，{family}就开始{do}。",
    )),
    (5, (
        "{noun}的{noun}很{quality}。", "{town}的{noun}非常有名。", "这个{noun}十分{quality}。",
        "{family}正在研究{noun}。", "关于{noun}，{clause}。", "人们常说，{idiom}。",
        "他们决定{verb}{noun}。", "{noun}可以{verb}{noun}。", "我们应该{verb}{noun}，不要{verb}{noun}。",
        "{town}到{town}的路很远。", "从{town}来的{noun}不多。", "请{verb}{noun}。", "怎样{verb}{noun}？",
        "那里的{noun}{quality}而{quality}。", "{verb}和{verb}不一样。",
    )),
)  # fmt: skip
