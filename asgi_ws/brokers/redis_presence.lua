-- Who is in a channel.
--
-- KEYS: members (connection -> {when it came, key, value}), expiries (connections by when they expire),
--       keys (key -> how many members have it), gone (keys without members, by the end of their grace)
-- ARGV: operation, then those of the operation. Times are in milliseconds of the server's clock.

local members, expiries, keys, gone = unpack(KEYS)
local time = redis.call('TIME')
local micros = time[1] * 1000000 + time[2]
local now = math.floor(micros / 1000)
local LEFT_OVER = 3600000 -- a key that went is told to those who come within this time

local function number(value)
  return string.format('%.0f', value)
end

local function keep(ms)
  for _, name in ipairs(KEYS) do
    if redis.call('PTTL', name) < ms then
      redis.call('PEXPIRE', name, number(ms))
    end
  end
end

local function lose(key, until_)
  if redis.call('HINCRBY', keys, key, -1) <= 0 then
    redis.call('HDEL', keys, key)
    redis.call('ZADD', gone, number(until_), key)
  end
end

local function remove(connection, until_)
  local packed = redis.call('HGET', members, connection)
  redis.call('ZREM', expiries, connection)
  if packed then
    redis.call('HDEL', members, connection)
    lose(cmsgpack.unpack(packed)[2], until_)
  end
end

local function purge()
  for _, connection in ipairs(redis.call('ZRANGEBYSCORE', expiries, '-inf', number(now))) do
    remove(connection, now)
  end
end

-- Whether the key is new.
local function put(connection, key, value, expiry)
  local came, new = micros, false
  local packed = redis.call('HGET', members, connection)
  local before = packed and cmsgpack.unpack(packed)
  if before then
    came = before[1]
  end
  if not before or before[2] ~= key then
    if redis.call('HINCRBY', keys, key, 1) == 1 then
      -- One that lingers, or of which nobody was told that it has gone, isn't.
      new = redis.call('ZREM', gone, key) == 0
    end
    if before then
      lose(before[2], now)
    end
  end
  if not before or before[2] ~= key or before[3] ~= value then
    redis.call('HSET', members, connection, cmsgpack.pack({came, key, value}))
  end
  redis.call('ZADD', expiries, number(now + expiry), connection)
  return new
end

local operations = {}

function operations.enter(connection, key, value, expiry)
  purge()
  local new = put(connection, key, value, tonumber(expiry))
  keep(expiry + LEFT_OVER)
  return new and 1 or 0
end

function operations.leave(connection, grace)
  purge()
  remove(connection, now + tonumber(grace))
  keep(grace + LEFT_OVER)
end

function operations.settle(key)
  purge()
  local lingers = redis.call('ZSCORE', gone, key)
  if lingers and tonumber(lingers) <= now then
    return redis.call('ZREM', gone, key)
  end
  return 0
end

-- Many connections come in parts; only behind the last one is it known who hasn't been refreshed.
function operations.refresh(last, expiry, ...)
  local given = {...}
  for i = 1, #given, 3 do
    put(given[i], given[i + 1], given[i + 2], tonumber(expiry))
  end
  keep(expiry + LEFT_OVER)
  if last ~= '1' then
    return {}
  end
  purge()
  local told = redis.call('ZRANGEBYSCORE', gone, '-inf', number(now))
  redis.call('ZREMRANGEBYSCORE', gone, '-inf', number(now))
  return told
end

function operations.members()
  purge()
  return redis.call('HGETALL', members)
end

function operations.count()
  purge()
  return {redis.call('HLEN', members), redis.call('HLEN', keys)}
end

return operations[ARGV[1]](unpack(ARGV, 2))
