-- A channel's stream: what is published with a retention gets its position, is kept and goes out, in one step.
--
-- KEYS: meta, stream (no others: while a slot of a cluster moves, one that doesn't exist would have all refused)
-- ARGV: operation, the server's run id, whether it loses nothing when it restarts ("1"), an epoch that nobody has had,
--       for how long meta is kept (ms), then those of the operation

local meta, stream = KEYS[1], KEYS[2]
local operation, run, durable, epoch, keep = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]

-- Another run of the server may have come back with less than was told to have happened: what was counted since then
-- would be counted again.
local known = redis.call('HMGET', meta, 'epoch', 'run')
if known[1] and (known[2] == run or durable == '1') then
  epoch = known[1]
  if known[2] ~= run then
    redis.call('HSET', meta, 'run', run)
  end
else
  redis.call('DEL', meta, stream) -- the stream can be left over from before meta was evicted
  redis.call('HSET', meta, 'epoch', epoch, 'run', run, 'offset', 0)
  redis.call('PEXPIRE', meta, keep)
end

if operation == 'publish' then
  local publish, channel, size, ttl, body = ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10]
  local offset = redis.call('HINCRBY', meta, 'offset', 1)
  redis.call('XADD', stream, 'MAXLEN', '=', size, string.format('%.0f-0', offset), 'p', body)
  redis.call('PEXPIRE', stream, ttl)
  redis.call('PEXPIRE', meta, keep)
  -- Version 1, an array of five: the body is its first three, see _Wire in redis.py.
  redis.call(publish, channel, '\1\149' .. body .. cmsgpack.pack(offset, epoch))
  return {offset, epoch}
end

local since, first, limit = ARGV[6], ARGV[7], ARGV[8]
if redis.call('PTTL', meta) < tonumber(keep) then
  redis.call('PEXPIRE', meta, keep)
end
local kept = {}
if limit ~= '0' and (first == '' or since == epoch) then
  local command = first == '' and {'XREVRANGE', stream, '+', '-'} or {'XRANGE', stream, first, '+'}
  if limit ~= '' then
    command[5], command[6] = 'COUNT', limit
  end
  kept = redis.call(unpack(command))
end
return {tonumber(redis.call('HGET', meta, 'offset')), epoch, kept}
